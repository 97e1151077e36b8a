"""The runner of the evidence study, on the embedded pair with a small budget: it goes on where it was stopped."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.evidence.columns import COLUMNS
from benchmarks.evidence.grounds import DEMO
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(
    DEMO,
    sweeps=(
        (
            "--learning-rates",
            "5e-4",
            "--kinds",
            "lora,full",
            "--seeds",
            "0,1",
            "--steps",
            "4",
            "--every",
            "2",
        ),
    ),
    attack=(*DEMO.attack[:10], "--limit", "8", "--max-new-tokens", "8", "--max-length", "64"),
    waves=(("none", "lox-aligned-1.5"),),
)
HARMFUL = [column for column in COLUMNS if column.name == "harmful"]
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/e2e")
from test_evidence_study import study
study(Path(sys.argv[1])).run()
"""


def study(folder):
    return Study(SMALL, Ledger(folder / "evidence.json"), folder / "work", 2, lambda text: None, HARMFUL)


def figures(folder):
    rows = Ledger(folder / "evidence.json").ground("demo")["rows"]
    return {row: {name: cell["figures"] for name, cell in cells.items()} for row, cells in rows.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    study(folder).run()
    return folder


def test_a_second_run_does_nothing(undisturbed):
    before = (undisturbed / "evidence.json").read_bytes()
    study(undisturbed).run()
    assert (undisturbed / "evidence.json").read_bytes() == before


def test_what_was_kept_is_what_the_commands_measured(undisturbed):
    known = figures(undisturbed)
    assert set(known) == {"none", "lox-aligned-1.5"}
    for row in known.values():
        assert [*row] == [BUILD, "harmful"]
        trials = row["harmful"]["trials"]
        assert sorted((one["kind"], one["seed"]) for one in trials) == [
            ("full", 0), ("full", 1), ("lora", 0), ("lora", 1),
        ]  # fmt: skip
        assert all([point[0] for point in one["points"]] == [0, 2, 4] for one in trials)
    assert known["none"] != known["lox-aligned-1.5"]


def test_a_cell_whose_settings_changed_is_measured_again(undisturbed, tmp_path):
    ledger = Ledger(tmp_path / "evidence.json")
    ledger.document.update(Ledger(undisturbed / "evidence.json").document)
    longer = dataclasses.replace(SMALL, sweeps=((*SMALL.sweeps[0][:-4], "--steps", "2", "--every", "2"),))
    before = dict(ledger.cell("demo", "none", "harmful"))
    Study(longer, ledger, tmp_path / "work", 2, lambda text: None, HARMFUL).run(["none"])
    after = ledger.cell("demo", "none", "harmful")
    assert after["key"] != before["key"]
    assert [point[0] for point in after["figures"]["trials"][0]["points"]] == [0, 2]


def test_a_study_that_is_killed_goes_on_to_the_same_figures(undisturbed, tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("work/*/measured-*/study.journal")) and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "harmful" not in Ledger(tmp_path / "evidence.json").ground("demo")["rows"].get(
        "lox-aligned-1.5", {}
    )
    study(tmp_path).run()
    assert figures(tmp_path) == figures(undisturbed)


def test_a_command_that_fails_is_kept_as_failed_and_tried_again(undisturbed, tmp_path):
    said = []
    wrong = dataclasses.replace(SMALL, attack=(*SMALL.attack, "--limit", "none"))
    ledger = Ledger(tmp_path / "evidence.json")
    Study(wrong, ledger, tmp_path / "work", 2, said.append, HARMFUL).run(["none"])
    cell = ledger.ground("demo")["rows"]["none"]["harmful"]
    assert cell["state"] == "failed"
    assert "limit" in cell["error"]
    assert any("limit" in text for text in said)
    study(tmp_path).run()
    assert figures(tmp_path) == figures(undisturbed)


def test_a_model_that_is_made_again_keeps_what_it_cost_at_first(undisturbed, tmp_path):
    ledger = Ledger(tmp_path / "evidence.json")
    ledger.document.update(Ledger(undisturbed / "evidence.json").document)
    first = dict(ledger.cell("demo", "lox-aligned-1.5", BUILD))
    ledger.ground("demo")["rows"]["lox-aligned-1.5"].pop("harmful")
    again = Study(SMALL, ledger, tmp_path / "work", 2, lambda text: None, HARMFUL)
    again.run(["lox-aligned-1.5"])
    assert (tmp_path / "work" / "lox-aligned-1.5" / "model" / "surgery.json").is_file()
    assert ledger.cell("demo", "lox-aligned-1.5", BUILD) == first
    assert figures(tmp_path) == figures(undisturbed)
