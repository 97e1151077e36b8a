"""Studies shared by processes: every trial is run once, whoever is killed, and when."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from surgery.studying import Study

LIMIT = 120.0

# One process at work on a study. It says what it does, a JSON list a line, in a file of its own. A settings document
# comes on stdin once all processes are ready, so that they begin together.
WORKER = """
import json, os, sys, time
from contextlib import suppress
from pathlib import Path
from surgery.studying import Study, journal, storages

journal._GRACE = 3
print("ready", flush=True)
settings = json.loads(sys.stdin.readline())

def say(*what):
    with open(settings["log"], "a") as file:
        file.write(json.dumps(what) + chr(10))

def look_then_claim(self, key):
    from optuna.trial import TrialState
    with suppress(Exception):
        if self.backend.get_trial(key).state.name != "WAITING":
            return False
        time.sleep(0.02)
        self.backend.set_trial_state_values(key, state=TrialState.RUNNING)
    return True

# Holds the trial that was taken until so many processes have one, so that none is too fast to share the work.
def meet(count):
    until = time.monotonic() + 60
    while len(list(Path(settings["log"]).parent.glob("log*"))) < count and time.monotonic() < until:
        time.sleep(0.01)

if settings.get("careless"):
    storages.Storage.claim = look_then_claim
study = Study.open(settings["place"], "s", identity={"of": "test"}, lease=settings.get("lease", 600.0))
if "search" in settings:
    study.search({"lr": ("log", 1e-6, 1e-1), "kind": ["lora", "full"]}, settings["search"], 5)
else:
    study.add([{"x": number} for number in range(settings["plan"])])
while (trial := study.claim(patience=settings.get("patience", 0.0))) is not None:
    say("began", trial.number, trial.params)
    meet(settings.get("meet", 1))
    if trial.number == settings.get("hang"):
        time.sleep(600)
    if trial.number == settings.get("die"):
        os._exit(9)
    time.sleep(settings.get("work", 0.0))
    trial.finish({"x": trial.number, "by": os.getpid()}, [float(trial.number)])
    say("ended", trial.number)
say("left")
"""


class Workers:
    """Processes on one study.

    Attributes:
        place: Where the study is.
        logs: What each process said, one file each.
    """

    def __init__(self, place, folder):
        self.place = str(place)
        self.folder = folder
        self.logs = []
        self.processes = []

    def start(self, count, **settings):
        """Start processes, and let them begin once all are ready."""
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(count)
        ]
        self.processes += started
        for process in started:
            assert select.select([process.stdout], [], [], LIMIT)[0]
            assert process.stdout.readline() == "ready\n"
        for process in started:
            self.logs.append(self.folder / f"log{len(self.logs)}")
            process.stdin.write(
                json.dumps({"place": self.place, "log": str(self.logs[-1]), **settings}) + "\n"
            )
            process.stdin.flush()
        return started

    def ended(self, processes):
        """Wait for processes; all must end well and say nothing."""
        for process in processes:
            output, errors = process.communicate(timeout=LIMIT)
            assert (process.returncode, output, errors) == (0, "", "")

    def run(self, count, **settings):
        """Start processes and wait for them."""
        self.ended(self.start(count, **settings))

    def said(self):
        """Everything that all of them said, by process."""
        texts = [log.read_text() if log.exists() else "" for log in self.logs]
        return [[json.loads(line) for line in text.splitlines()] for text in texts]

    def counted(self, word):
        """How often each trial `began` or `ended`."""
        return Counter(entry[1] for log in self.said() for entry in log if entry[0] == word)

    def wait_for(self, *entry):
        """Wait until a process has said something."""
        until = time.monotonic() + LIMIT
        while not any(found[: len(entry)] == list(entry) for log in self.said() for found in log):
            assert time.monotonic() < until
            time.sleep(0.02)

    def study(self):
        """The study as this process sees it."""
        return Study.open(self.place, "s", identity={"of": "test"})


@pytest.fixture(params=["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def workers(request, tmp_path):
    """No process yet; none left afterwards."""
    found = Workers(
        tmp_path / "out" if request.param == "journal" else f"sqlite:///{tmp_path}/s.db", tmp_path
    )
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def once(count):
    return Counter(range(count))


def test_processes_that_begin_together_run_every_trial_once(workers):
    workers.run(3, plan=60, meet=3)
    assert workers.counted("began") == workers.counted("ended") == once(60)
    for log in workers.said():
        assert log[0][0] == "began", "each took a trial while the others held theirs"
    found = workers.study().finished()
    assert [(one.number, one.params, one.result["x"]) for one in found] == [
        (n, {"x": n}, n) for n in range(60)
    ]
    for log in workers.said():
        numbers = [entry[1] for entry in log if entry[0] == "began"]
        assert numbers == sorted(numbers), "in the order planned"


def test_a_claim_that_looks_first_and_takes_then_would_run_trials_twice(workers):
    workers.start(3, plan=40, meet=3, careless=True)
    for process in workers.processes:
        process.communicate(timeout=LIMIT)
    assert max(workers.counted("began").values()) > 1


def test_a_killed_process_takes_no_trial_with_it(workers):
    hanging, *_ = workers.start(1, plan=12, hang=4)
    workers.wait_for("began", 4)
    [other] = workers.start(1, plan=12, patience=LIMIT)
    workers.wait_for("ended", 11)
    assert workers.counted("began")[4] == 1, "its process lives, so it is left to it"
    assert other.poll() is None, "and waited for"
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()
    workers.ended([other])
    assert workers.counted("began") == once(12) + Counter([4])
    assert workers.counted("ended") == once(12)
    assert [one.number for one in workers.study().finished()] == list(range(12))


def test_after_a_kill_the_same_command_goes_on(workers):
    [first] = workers.start(1, plan=8, hang=3)
    workers.wait_for("began", 3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [one.number for one in workers.study().finished()] == [0, 1, 2]
    workers.run(1, plan=8)
    assert workers.counted("began") == once(8) + Counter([3])
    assert workers.counted("ended") == once(8)
    by = {one.number: one.result["by"] for one in workers.study().finished()}
    assert [by[number] == first.pid for number in range(8)] == [True] * 3 + [False] * 5


def test_a_trial_that_ends_its_process_is_left_after_three_of_them(workers):
    for _ in range(3):
        [process] = workers.start(1, plan=4, die=1)
        assert process.wait(LIMIT) == 9
    workers.run(2, plan=4, die=1, patience=LIMIT)
    assert workers.counted("began") == once(4) + Counter({1: 2})
    found = workers.study().finished()
    assert [one.error is None for one in found] == [True, False, True, True]
    assert "3 processes ended" in found[1].error


def test_a_search_by_two_processes_has_as_many_trials_as_asked(workers):
    workers.run(2, search=14)
    assert workers.counted("began") == workers.counted("ended") == once(14)
    found = workers.study().finished()
    assert len({one.params["lr"] for one in found}) == len(found) == 14
    workers.run(2, search=17)
    assert workers.counted("ended") == once(17)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_no_finished_trial_is_lost_or_run_again(workers, seed):
    draw = random.Random(seed)
    settings = {"plan": 60, "work": 0.02, "lease": 4.0, "patience": LIMIT}
    ended, again = set(), 0
    for _ in range(6):
        running = workers.start(2, **settings)
        time.sleep(draw.uniform(0.05, 1.5))
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        began = workers.said()[-2:]
        again += len({entry[1] for log in began for entry in log if entry[0] == "began"} & ended)
        ended = set(workers.counted("ended"))
        assert ended <= {one.number for one in workers.study().finished()}
    workers.run(2, **settings)
    assert again == 0
    found = workers.study().finished()
    assert [one.number for one in found] == list(range(60))
    # A process that was cut off between keeping a result and saying so is one that did not say so.
    assert max(workers.counted("ended").values()) == 1
    assert all(one.error is None or "3 processes" in one.error for one in found)
    assert (workers.counted("began") - once(60)).total() <= 12
