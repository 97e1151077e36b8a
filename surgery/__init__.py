"""Edit released language models so that harmful fine-tuning becomes hard, and measure whether it did."""

__version__ = "0.1.0"
