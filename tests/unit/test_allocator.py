"""What was freed is no longer the process's; measured in interpreters of their own."""

import ctypes
import os
import subprocess
import sys

import pytest

from surgery import allocator

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

glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library, which keeps to its own ways"
)


def held(switch):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", HOLES, switch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=kept)
    return int(done.stdout)


@glibc
def test_freed_tensors_leave_the_process_although_small_ones_between_them_stay():
    assert held("off") - held("on") > 0.9 * COUNT * SIZE


def test_what_the_user_set_for_the_c_library_stands(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert not allocator.return_freed()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.return_freed()
