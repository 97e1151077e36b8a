"""Places for studies, and trials that are planned and claimed."""

import subprocess
import sys
import time

import pytest

from surgery.studying import Study, owner

IDENTITY = {"model": "abc", "options": {"steps": 10, "rates": [1e-4, 5e-4]}}
# Renewed four times in it: a machine under load may be late by one or two.
SHORT = 1.0
LONG = 600.0


@pytest.fixture(params=["journal", "sqlite"])
def place(request, tmp_path):
    """Where a study is kept."""
    return tmp_path / "out" if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def opened(place):
    """A new handle on the study, as another process would have one."""

    def call(identity=IDENTITY, lease=LONG, **options):
        return Study.open(place, "attacks", identity=identity, lease=lease, **options)

    return call


@pytest.fixture(scope="module")
def dead():
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = {**owner.me(), "pid": child.pid, "started": owner._started(child.pid)}
    assert alive["started"]
    assert not owner.is_gone(alive)
    child.communicate(b"\n", timeout=60)
    return alive


def planned(count):
    return [{"lr": 10.0**-number, "kind": "lora", "seed": number} for number in range(count)]


def claimed(study):
    """All that waits, claimed."""
    found = []
    while (trial := study.claim()) is not None:
        found.append(trial)
        assert len(found) < 1000
    return found


def die(study, trial, dead):
    """What a trial looks like whose process was killed."""
    trial._over.set()
    trial._renewing.join()
    assert study._storage.mark(trial._key, "lease", {"owner": dead, "at": time.time()})


def leased(study, trial):
    """When a trial's lease was last renewed, by the clock of who runs it."""
    [found] = [one for one in study._storage.trials() if one._trial_id == trial._key]
    return found.user_attrs["lease"]["at"]


def numbers(study):
    return [one.number for one in study.finished()]
