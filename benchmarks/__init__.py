"""What the toolkit costs: ratios of two things alternated in one run; see `python -m benchmarks --help`."""
