"""An edit of a small pair as an adapter."""

import surgery
from surgery.adapter import adapter_method
from surgery.checkpoint.layout import open_checkpoint
from surgery.methods.lox import LoX
from surgery.options import Options

ALPHA = 1.5


def write(base, aligned, output, **settings):
    """The outcome of `surgery lox base aligned --as-lora`."""
    method = LoX(**{"rank": 6, "alpha": ALPHA, **settings})
    method, _ = adapter_method(method, open_checkpoint(aligned, "aligned"))
    return surgery.apply(
        method,
        base=base,
        model=aligned,
        output=output,
        options=Options(as_lora=True),
    )
