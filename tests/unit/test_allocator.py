"""What was freed is no longer the process's, or is its next tensor; measured in interpreters of their own."""

import ctypes
import os
import subprocess
import sys

import pytest

from surgery import allocator
from surgery.attacking import campaign
from surgery.evaluate import evaluation
from surgery.methods.vaccine import Vaccine
from surgery.sweeping import study, terrain
from surgery.train.running import immunise
from surgery.train.training import Training

COUNT, SIZE = 60, 2 << 20
# Blocks of 2 MiB, freed while small ones between them stay. Freeing a block of 30 MiB first makes glibc raise its
# own threshold above them, as the first large tensor of a checkpoint does.
HOLES = f"""
import sys, torch
from surgery import allocator
if sys.argv[1] == "on":
    assert allocator.return_freed()
first = torch.ones(30 << 20, dtype=torch.uint8)
del first
blocks, small = [], []
for _ in range({COUNT}):
    blocks.append(torch.ones({SIZE}, dtype=torch.uint8))
    small.append(torch.ones(50_000, dtype=torch.uint8))
del blocks
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:")))
"""

# Pages touched for the first time while tensors are made and dropped, once what is kept is there: where the heap
# begins decides how they lie in it, and in how many rounds it has grown to hold them all. And what of the process's
# memory is left at the end of the block.
ROUNDS = 50
STEPS = f"""
import resource, sys, torch
from contextlib import nullcontext
from surgery import allocator

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))

def step():
    # Freed in the order in which a backward pass does, the last first, and in another.
    tensors = [torch.ones({SIZE}, dtype=torch.uint8) for _ in range(8)]
    while tensors:
        tensors.pop(len(tensors) // 2)

if "returned" in sys.argv:
    assert allocator.return_freed()
step()
before = held()
with allocator.freed_kept() if "kept" in sys.argv else nullcontext():
    for _ in range({ROUNDS}):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    kept = held() - before
print(faults, kept, held() - before)
"""

glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library, which keeps to its own ways"
)


def told(script, *switches):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", script, *switches]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=kept)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_freed_tensors_leave_the_process_although_small_ones_between_them_stay():
    assert told(HOLES, "off")[0] - told(HOLES, "on")[0] > 0.9 * COUNT * SIZE


@glibc
def test_in_a_block_that_keeps_them_freed_tensors_are_the_next_ones_and_go_back_at_its_end():
    faults, kept, left = told(STEPS, "returned", "kept")
    control, *_ = told(STEPS, "returned")
    assert control > ROUNDS * 8
    assert faults < control / ROUNDS
    assert kept > 7 * SIZE
    assert left < SIZE


class Library:
    def __init__(self):
        self.calls = []

    def mallopt(self, what, value):
        self.calls.append((what, value))
        return 1

    def malloc_trim(self, pad):
        self.calls.append("trimmed")


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    monkeypatch.setattr(allocator, "_returning", False)
    return found


def test_a_program_that_did_not_ask_is_left_alone(library):
    with allocator.freed_kept():
        pass
    assert library.calls == []


def test_a_block_within_another_ends_with_it_also_where_it_fails(library):
    allocator.return_freed()
    with pytest.raises(ValueError, match="within"), allocator.freed_kept():
        with allocator.freed_kept():
            inside = list(library.calls)
        assert library.calls == inside
        raise ValueError("within")
    returned = (-3, allocator.LARGE)
    assert library.calls[0] == returned
    assert library.calls[1:3] == [(-3, allocator.KEPT), (-1, 2 * allocator.KEPT)]
    assert library.calls[3] == returned
    assert library.calls[-1] == "trimmed"


def test_what_the_user_set_for_the_c_library_stands(monkeypatch):
    monkeypatch.setattr(allocator, "_returning", False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert not allocator.return_freed()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(allocator, "_returning", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.return_freed()


@pytest.mark.parametrize("computes", [campaign.run, evaluation.evaluate, study.run, terrain.draw])
def test_what_computes_with_a_model_keeps_what_it_frees(library, computes):
    allocator.return_freed()
    with pytest.raises(TypeError):
        computes()
    assert (-3, allocator.KEPT) in library.calls
    assert library.calls[-1] == "trimmed"


@pytest.mark.parametrize("full", [False, True])
def test_training_keeps_what_it_frees_but_where_all_weights_are_trained(library, tmp_path, full):
    allocator.return_freed()
    training = Training(steps=1, batch_size=1, full=full)
    immunise(Vaccine(), model="demo:aligned", output=tmp_path / "out", training=training)
    assert ((-3, allocator.KEPT) in library.calls) is not full
