"""Run the benchmarks: correctness first, then the figures, their table and `benchmarks/results/*.json`.

python -m benchmarks                      everything (about an hour on two cores)
python -m benchmarks --only copying,memory
python -m benchmarks --table              the table of the results on file, for docs/performance.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

# The tests of what is timed: no figure is printed while one of them fails.
CORRECTNESS = (
    *(f"tests/theory/test_{name}.py" for name in ("certificate", "lox", "rounding", "spectral")),
    "tests/kernels",
    "tests/unit/test_store.py",
    "tests/theory/test_vaccine.py",
    "tests/theory/test_t_vaccine.py",
    "tests/theory/test_circuit_breakers.py",
    "tests/theory/test_booster.py",
    "tests/theory/test_tar.py",
    "tests/theory/test_mlac.py",
    "tests/theory/test_shaped_states.py",
    "tests/theory/test_repnoise.py",
    "tests/unit/test_workers.py",
    "tests/e2e/test_files_in_files_out.py",
)


def benchmarks(folder: Path, repeats: int) -> dict[str, Callable[[], Sequence[Any]]]:
    """The benchmarks by name, in the order of the table."""
    from benchmarks import (
        bilevel,
        copying,
        decomposition,
        kinds,
        memory,
        merging,
        scaling,
        small_model,
        stages,
        training,
    )

    settings = (("spiked", 1e-2), ("bulk", 1e-3))
    return {
        "copying": lambda: copying.rows(folder, repeats, settings),
        "decomposition": lambda: decomposition.rows(repeats),
        "memory": lambda: memory.rows(folder),
        "kinds": lambda: kinds.rows(repeats),
        "small_model": lambda: small_model.rows(folder, repeats),
        "scaling": lambda: scaling.rows(folder, repeats),
        "stages": lambda: stages.rows(folder),
        "training": lambda: training.rows(repeats),
        "bilevel": lambda: bilevel.rows(repeats),
        "merging": lambda: merging.rows(folder, repeats),
    }


def machine() -> dict[str, object]:
    """What the figures were measured on, as far as it matters to them."""
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown"
    )
    flags = next((set(line.split()) for line in info if line.startswith("flags")), set())
    features = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16", "sha_ni") if flag in flags]
    return {
        "processor": model,
        "features": features,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def correct() -> bool:
    """Whether the tests of what is timed pass."""
    existing = [path for path in CORRECTNESS if (ROOT / path).exists()]
    return (
        subprocess.run([sys.executable, "-m", "pytest", "-q", *existing], cwd=ROOT, check=False).returncode
        == 0
    )


def commit(*options: str) -> str:
    """The commit that is measured; with `--dirty` marked where the tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def table(names: Sequence[str]) -> str:
    """The results on file as a Markdown table."""
    lines = ["| measured | figure | target | met | behind it |", "|---|---|---|---|---|"]
    for name in names:
        file = RESULTS / f"{name}.json"
        for row in json.loads(file.read_text())["rows"] if file.is_file() else ():
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            lines.append(
                f"| {row['name']} | {row['value']:.3g} {row['unit']} | {row['target']} | {met} | {row['detail']} |"
            )
    return "\n".join(lines)


def into_page(text: str) -> None:
    """Put the table into docs/performance.md, between its marks."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Exit code: 0, or 1 where a test of what is timed fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of benchmarks, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each thing; medians are reported")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "benchmarks" / "data", help="for pairs and outputs: 25 GB"
    )
    parser.add_argument(
        "--table", action="store_true", help="only put the results on file into docs/performance.md"
    )
    options = parser.parse_args()
    every = benchmarks(options.folder, options.repeats)
    chosen = options.only.split(",") if options.only else list(every)
    if unknown := sorted(set(chosen) - set(every)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(every)}")
    if not options.table:
        if not correct():
            sys.stderr.write("a test of what is timed fails: no figures\n")
            return 1
        RESULTS.mkdir(exist_ok=True)
        for name in chosen:
            rows = [row.document() for row in every[name]()]
            document = {
                "commit": commit("--dirty"),
                "date": datetime.now(UTC).date().isoformat(),
                **machine(),
                "rows": rows,
            }
            (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    text = table(list(every))
    into_page(text)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
