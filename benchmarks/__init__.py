"""What the toolkit costs, measured as ratios of two things alternated in one run; see `python -m benchmarks --help`."""
