"""Rebuild the embedded pair from nothing: `python -m surgery.demo [--output DIR]`."""

import os

# Read when torch is imported: with spinning threads small steps crawl beside any other load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path

from surgery.demo.recipe import rebuild
from surgery.errors import SurgeryError


def main() -> int:
    """The exit code of the run; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m surgery.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-pair"), help="a new folder (%(default)s)")
    try:
        rebuild(parser.parse_args().output, _say)
    except SurgeryError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
