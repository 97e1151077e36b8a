"""Run the evidence study, as far as docs/evidence.json lacks it, and make its page.

python -m benchmarks.evidence                        both pairs: what is not in the ledger (hours on two cores)
python -m benchmarks.evidence --grounds demo         the embedded pair alone: the page says how long from nothing
python -m benchmarks.evidence --from-nothing         forget what the ledger has of them, and their models
python -m benchmarks.evidence --page                 only make the page, its plot and the README's table again
python -m benchmarks.evidence --check                whether they are what the ledger says; exit 1 if not
python -m benchmarks.evidence --again ROW            repeat one row of the demo ground briefly; exit 1 if it differs
"""

import argparse
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.evidence.grounds import GROUNDS
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.running import StoppedError
from benchmarks.evidence.study import Study, code
from benchmarks.timing import cores

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "docs" / "evidence.json"
WORK = ROOT / "benchmarks" / "data" / "evidence"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grounds", default=",".join(GROUNDS), help="separated by commas")
    parser.add_argument("--rows", default="", help="only these rows, or search; separated by commas")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="where figures are kept")
    parser.add_argument("--folder", type=Path, default=WORK, help="where commands run: 10 GB for both pairs")
    parser.add_argument("--processes", type=int, default=cores(), help="commands side by side")
    parser.add_argument("--from-nothing", action="store_true")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--page", action="store_true")
    chosen.add_argument("--check", action="store_true")
    chosen.add_argument("--again", metavar="ROW", choices=[row.name for row in ROWS])
    options = parser.parse_args()
    options.grounds, options.rows = (
        [name for name in words.split(",") if name] for words in (options.grounds, options.rows)
    )
    searches = {name for ground in GROUNDS.values() for name in ground.searches}
    for kind, asked, known in (
        ("ground", options.grounds, list(GROUNDS)),
        ("row", options.rows, [row.name for row in ROWS] + sorted(searches)),
    ):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"no {kind} {unknown[0]}; there are {', '.join(known)}")
    return options


def main() -> int:
    """Exit code 0; 1 where a check fails; 130 where a command was interrupted."""
    options = arguments()
    from benchmarks.evidence import page, repeating

    if options.check:
        return page.check(Ledger(options.ledger))
    if options.again:
        return repeating.again(options.again, Ledger(options.ledger), options.folder.with_name("again"))
    ledger, stopped = Ledger(options.ledger), None
    try:
        for name in () if options.page else options.grounds:
            carried_out(name, ledger, options)
    except StoppedError as error:
        stopped = error
    # Of an interrupted study too: the page is what the ledger says at any time.
    page.write(ledger)
    if stopped is None:
        return 0
    again = "run it again without --from-nothing" if options.from_nothing else "run the same command again"
    say(f"{stopped} was interrupted; {again} to go on")
    return 130


def carried_out(name: str, ledger: Ledger, options: argparse.Namespace) -> None:
    """One ground's part of the study; timed where it is all of it, from nothing to the end, and nothing failed."""
    folder, begun, commit = options.folder / name, time.monotonic(), code()
    if options.from_nothing:
        ledger.forget(name)
        shutil.rmtree(folder, ignore_errors=True)
    Study(GROUNDS[name], ledger, folder, options.processes, say).run(options.rows)
    cells = [cell for row in ledger.ground(name)["rows"].values() for cell in row.values()]
    if options.from_nothing and not options.rows and all(cell["state"] == "done" for cell in cells):
        took = {"wall": round(time.monotonic() - begun, 1), "processes": options.processes, "commit": commit}
        ledger.timed(name, {**took, "date": datetime.now(UTC).date().isoformat()})


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
