import subprocess
import sys

import pytest

from surgery import resources


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (mount / "a/b").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/a/b\n")
    (proc / "meminfo").write_text("MemTotal: 999999999 kB\nMemAvailable:  8388608 kB\n")
    monkeypatch.setattr(resources, "_PROC", proc)
    monkeypatch.setattr(resources, "_CGROUP", mount)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(16)))
    return mount


def test_without_limits_the_affinity_counts(cgroup):
    assert resources.cores() == 16
    assert resources.memory_available() == 8 << 30


@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_the_tightest_quota_on_the_way_up_counts(cgroup, place):
    (cgroup / place / "cpu.max").write_text("150000 100000\n")
    (cgroup / place / "memory.max").write_text(str(4 << 30))
    (cgroup / place / "memory.current").write_text(str(3 << 30))
    (cgroup / place / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\n")
    assert resources.cores() == 2
    assert resources.memory_available() == 2 << 30


def test_a_quota_of_max_is_no_limit(cgroup):
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert resources.cores() == 16
    assert resources.memory_available() == 8 << 30


def test_version_one_limits_are_read(cgroup):
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text("300000")
    (cgroup / "cpu/cpu.cfs_period_us").write_text("100000")
    (cgroup / "memory").mkdir()
    (cgroup / "memory/memory.limit_in_bytes").write_text(str(2 << 30))
    (cgroup / "memory/memory.usage_in_bytes").write_text(str(1 << 30))
    assert resources.cores() == 3
    assert resources.memory_available() == 1 << 30


def test_this_machine_has_cores_memory_and_disk(tmp_path):
    assert resources.cores() >= 1
    assert resources.memory_available() > 0
    assert resources.disk_free(tmp_path / "not" / "there") > 0
    assert resources.peak_rss() > 1 << 20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    ballast = bytearray(b"x") * (600 << 20)  # written to, so that it is resident
    code = "from surgery import resources; print(resources.peak_rss())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 1 << 20 < found < len(ballast)
    assert resources.peak_rss() > len(ballast)  # control
