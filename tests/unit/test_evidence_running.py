"""Commands of the evidence study, forked from a process that has their imports; and which models are made first."""

import importlib.util
import json
import os
import sys

import pytest

from benchmarks.evidence.grounds import DEMO, REAL
from benchmarks.evidence.keys import BUILD, Keys
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import named
from benchmarks.evidence.running import IMPORTED, CommandFailedError, StoppedError, run
from benchmarks.evidence.study import Study

MODULE = """
import json, os, sys, torch
known = {"torch": "peft" in sys.modules, "threads": torch.get_num_threads(), "arguments": sys.argv[1:]}
print(json.dumps(known | {"folder": os.getcwd(), "process": os.getpid()}))
print("said", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "told_by_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return ["python", "-m", "told_by_a_test"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_command_runs_in_its_folder_with_its_words_and_threads(module, tmp_path, threads):
    work, log = tmp_path / "work", tmp_path / "log.txt"
    work.mkdir()
    ran = run([*module, "0", "two words"], work, log, threads=threads)
    assert ran.words == "python -m told_by_a_test 0 'two words'"
    assert 0 < ran.wall < 60
    assert ran.peak > 100
    first, told, said = log.read_text().splitlines()
    assert (first, said) == (f"$ {ran.words}", "said")
    found = json.loads(told)
    assert found.pop("process") != os.getpid()
    assert found == {
        "torch": True, "threads": threads, "arguments": ["0", "two words"], "folder": str(work),
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
    with pytest.raises(StoppedError, match="python -m"):
        run([*module, "130"], tmp_path, log, threads=1)


def test_a_mistake_in_a_command_of_the_tool_is_told_in_its_own_words(tmp_path):
    with pytest.raises(CommandFailedError, match="nowhere"):
        run(["surgery", "lox", "nowhere", "nowhere"], tmp_path, tmp_path / "log.txt", threads=1)


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_imported_beforehand_is_there(name):
    assert importlib.util.find_spec(name)


@pytest.mark.parametrize("ground", [DEMO, REAL])
def test_a_model_is_made_after_the_one_it_starts_from(ground, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Study, "_built", lambda self, row, keys: made.append(row.name))
    ledger = Ledger(tmp_path / "evidence.json")
    rows = [named(name) for name in ("vaccine+lox", "circuit-breakers+lox", "vaccine", "booster")]
    Study(ground, ledger, tmp_path, 2, lambda text: None)._models(rows, Keys(ground, ledger, BUILD))
    assert sorted(made[:3]) == ["booster", "circuit-breakers", "vaccine"]
    assert sorted(made[3:]) == ["circuit-breakers+lox", "vaccine+lox"]
