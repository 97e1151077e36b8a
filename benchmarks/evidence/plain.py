"""Plain fine-tuning as a command, `python -m benchmarks.evidence.plain MODEL -o OUT`: the control of trained methods.

It learns the defender's aligned rows by the loop, the merge and the adapter that the methods use, with none of their
terms: what a method does beyond this row is its own doing, and what it costs is told in runs of this one.
"""

import argparse
import sys
from pathlib import Path

from surgery.options import Options
from surgery.train import presets
from surgery.train.running import immunise
from surgery.train.sft import SFT


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--aligned-data", action="append", default=[])
    for name in ("overwrite", "full"):
        parser.add_argument(f"--{name}", action="store_true", default=None)
    for name, kind in (("steps", int), ("batch-size", int), ("max-length", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind)
    given = vars(parser.parse_args())
    model, output = given.pop("model"), given.pop("output")
    data, overwrite = given.pop("aligned_data"), bool(given.pop("overwrite"))
    method, training = presets.from_preset(
        SFT, "small", {name: value for name, value in given.items() if value is not None}
    )
    immunise(
        method,
        model=model,
        data={"aligned": data} if data else None,
        output=output,
        training=training,
        options=Options(overwrite=overwrite),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
