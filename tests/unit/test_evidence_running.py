"""Commands of the evidence study, forked from a process that has their imports; and which models are made first."""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from ledgers import filled

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import page, study
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import DEMO, REAL, SEARCH, search_on
from benchmarks.evidence.keys import BUILD, Keys
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import NONE, named
from benchmarks.evidence.running import IMPORTED, CommandFailedError, Ran, StoppedError, run
from benchmarks.evidence.study import Study
from surgery import resources

MODULE = """
import json, os, signal, sys, torch
from surgery import workers
known = {"torch": "peft" in sys.modules, "threads": torch.get_num_threads(), "arguments": sys.argv[1:]}
print(json.dumps(known | {"workers": workers.count(), "folder": os.getcwd(), "process": os.getpid()}))
print("said", file=sys.stderr, flush=True)
if sys.argv[1] == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "told_by_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return ["python", "-m", "told_by_a_test"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_command_runs_in_its_folder_with_its_words_and_threads(module, tmp_path, monkeypatch, threads):
    monkeypatch.chdir(tmp_path)
    work, log, before = Path("work"), tmp_path / "log.txt", dict(os.environ)
    work.mkdir()
    ran = run([*module, "0", "two words"], work, log, threads=threads)
    assert ran.words == "python -m told_by_a_test 0 'two words'"
    assert dict(os.environ) == before
    assert 0 < ran.wall < 60
    assert ran.peak > 100
    first, told, said = log.read_text().splitlines()
    assert (first, said) == (f"$ {ran.words}", "said")
    found = json.loads(told)
    assert found.pop("process") != os.getpid()
    assert found == {
        "torch": True, "threads": threads, "workers": min(threads, resources.cores()),
        "arguments": ["0", "two words"], "folder": str(tmp_path / "work"),
    }  # fmt: skip


def test_commands_leave_nothing_of_themselves_to_those_after_them(module, tmp_path):
    log = tmp_path / "log.txt"
    for _ in range(2):
        run([*module, "0"], tmp_path, log, threads=1)
    first, second = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    assert first.pop("process") != second.pop("process")
    assert first == second
    assert "told_by_a_test" not in sys.modules


def test_a_command_that_fails_says_why_and_one_that_was_stopped_is_no_failure(module, tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(CommandFailedError, match=r"ended with 3: [^$]*said"):
        run([*module, "3"], tmp_path, log, threads=1)
    for how in ("130", "interrupted"):
        with pytest.raises(StoppedError, match="python -m"):
            run([*module, how], tmp_path, log, threads=1)


def test_a_mistake_in_a_command_of_the_tool_is_told_in_its_own_words(tmp_path):
    with pytest.raises(CommandFailedError, match="nowhere"):
        run(["surgery", "lox", "nowhere", "nowhere"], tmp_path, tmp_path / "log.txt", threads=1)


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_imported_beforehand_is_there(name):
    assert importlib.util.find_spec(name)
    if name.startswith("benchmarks."):
        importlib.import_module(name)


@pytest.mark.parametrize("ground", [DEMO, REAL])
def test_a_search_runs_after_the_model_it_starts_from_and_before_what_it_chooses(
    ground, tmp_path, monkeypatch
):
    order = []
    monkeypatch.setattr(Ledger, "describe", lambda *_: None)
    monkeypatch.setattr(Study, "_built", lambda self, row, keys: order.append(row.name))
    monkeypatch.setattr(Study, "_based", lambda *_: None)
    monkeypatch.setattr(Study, "_reference", lambda *_: None)
    monkeypatch.setattr(Study, "_search", lambda self, name, cell, number, keys: order.append(name))
    ground = dataclasses.replace(ground, prepare=lambda folder: "data")
    Study(ground, Ledger(tmp_path / "evidence.json"), tmp_path, 1, lambda text: None, columns=()).run()
    for search, on, chosen in (
        (SEARCH, NONE, "lox-best"),
        (search_on("circuit-breakers"), "circuit-breakers", "circuit-breakers+lox-best"),
    ):
        places = [place for place, name in enumerate(order) if name == search]
        assert len(places) == len(ground.searches[search].sweeps)
        assert order.index(on) < places[0]
        assert places[-1] < order.index(chosen)


@pytest.mark.parametrize("ground", [DEMO, REAL])
def test_a_model_is_made_after_the_one_it_starts_from(ground, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Study, "_built", lambda self, row, keys: made.append(row.name))
    ledger = Ledger(tmp_path / "evidence.json")
    rows = [named(name) for name in ("vaccine+lox", "circuit-breakers+lox", "vaccine", "booster")]
    Study(ground, ledger, tmp_path, 2, lambda text: None)._models(rows, Keys(ground, ledger, BUILD))
    assert sorted(made[:3]) == ["booster", "circuit-breakers", "vaccine"]
    assert sorted(made[3:]) == ["circuit-breakers+lox", "vaccine+lox"]


def test_tasks_behind_one_that_was_interrupted_are_left(tmp_path):
    done = []

    def stopped():
        raise StoppedError("first")

    tasks = [stopped, *(lambda number=number: done.append(number) for number in range(50))]
    with pytest.raises(StoppedError):
        Study(DEMO, Ledger(tmp_path / "evidence.json"), tmp_path, 1, print)._together(tasks, 1)
    assert len(done) < 50


@pytest.mark.parametrize(("one_by_one", "threads"), [(True, None), (False, 1)])
def test_models_are_made_on_all_cores_or_side_by_side_and_sweeps_without_the_margin(
    tmp_path, monkeypatch, one_by_one, threads
):
    ran = []

    def noted(words, folder, log, *, threads=None):
        ran.append((words, threads))
        return Ran(" ".join(words), 1.0, 1.0)

    monkeypatch.setattr(study, "run", noted)
    ledger = filled(tmp_path / "evidence.json")
    ledger.ground("demo")["rows"].pop("lox-aligned-1.5")
    ground = dataclasses.replace(
        DEMO,
        one_by_one=one_by_one,
        waves=(("lox-aligned-1.5",), (SEARCH,)),
        searches={SEARCH: DEMO.searches[SEARCH]},
    )
    Study(ground, ledger, tmp_path / "work", 2, lambda text: None, []).run()
    assert ran[0][0][:2] == ["surgery", "lox"]
    assert ran[0][1] == threads
    sweeps = [words for words, count in ran[1:] if count == 1]
    assert len(sweeps) == len(DEMO.searches[SEARCH].sweeps) == len(ran) - 1
    assert all("--no-margin" in words for words in sweeps)


@pytest.mark.parametrize(
    ("changes", "timed"),
    [
        ({}, True),
        ({"rows": ["none"]}, False),
        ({"from_nothing": False}, False),
        ({"stops": True}, False),
        ({"fails": True}, False),
    ],
)
def test_only_a_whole_run_from_nothing_is_timed(tmp_path, monkeypatch, changes, timed):
    ledger = filled(tmp_path / "evidence.json")
    kept = json.loads(ledger.path.read_text())["grounds"]["demo"]

    def run(self, only):
        ledger.document["grounds"]["demo"] = kept
        if changes.get("fails"):
            ledger.put("demo", "vaccine", BUILD, {"state": "failed", "key": ""})
        if changes.get("stops"):
            raise StoppedError("surgery lox")

    monkeypatch.setattr(Study, "run", run)
    usual = {"folder": tmp_path, "rows": [], "from_nothing": True, "processes": 2}
    try:
        command.carried_out("demo", ledger, argparse.Namespace(**usual | changes))
    except StoppedError:
        assert changes["stops"]
    again = Ledger(ledger.path)
    assert ("from_nothing" in again.ground("demo")) == timed
    said = "".join(page._made(again, Facts(again, "demo")))
    assert ("One run from nothing to its end: 0 minutes, 2 commands side by side" in said) == timed


@pytest.mark.parametrize(("options", "code"), [([], 130), (["--page"], 0)])
def test_the_page_of_an_interrupted_study_is_what_its_ledger_says(
    tmp_path, monkeypatch, capsys, options, code
):
    path, written = filled(tmp_path / "evidence.json").path, []

    def run(self, only):
        self.ledger.put("demo", "vaccine", BUILD, {"state": "failed", "key": ""})
        raise StoppedError("surgery lox")

    monkeypatch.setattr(Study, "run", run)
    monkeypatch.setattr(page, "write", lambda ledger: written.append(ledger.document))
    monkeypatch.setattr(sys, "argv", ["evidence", "--ledger", str(path), "--folder", str(tmp_path), *options])
    assert command.main() == code
    assert written == [json.loads(path.read_text())]
    assert ("surgery lox was interrupted" in capsys.readouterr().err) == (code == 130)
