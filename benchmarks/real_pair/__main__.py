"""Build what is missing of the real pair and print where it is: `python -m benchmarks.real_pair --help`."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.real_pair.pair import NO_PACKAGE, RECIPES, PackageUnavailableError, build_aligned, build_base


def main(arguments: list[str]) -> int:
    """Return 0 after printing folders and refusal rates as JSON, 3 if the package is not to be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help=f"aligned sides to build: {', '.join(RECIPES)}")
    parser.add_argument("--measure", nargs="+", default=[], help="models whose refusal rates are wanted")
    options = parser.parse_args(arguments)
    try:
        base = build_base()
    except PackageUnavailableError as error:
        sys.stderr.write(f"{error}\n")
        return NO_PACKAGE
    folders = {"base": base} | {name: build_aligned(name, base) for name in options.recipes}
    result: dict[str, object] = {name: str(folder) for name, folder in folders.items()}
    if options.measure:
        from benchmarks.real_pair import alignment

        result["public_prompts"] = alignment.data_folder() is not None
        result["refused"] = {folder: alignment.measure(Path(folder)) for folder in options.measure}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
