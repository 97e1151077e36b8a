"""What this process may use: cores, memory and disk, as the container grants them.

A container's limits stand in its cgroup, not in `/proc/cpuinfo` or `/proc/meminfo`; counting the host's
cores or memory instead makes runs slow or gets them killed.
"""

import math
import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def _number(path: Path) -> int | None:
    """The whole number in a file, None where there is no file or no number ("max")."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _own_cgroups() -> list[Path]:
    """The cgroup folders that limit this process, innermost first; the mount itself always comes last."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    unified = [line.split(":", 2)[2].strip("/") for line in lines if line.startswith("0::")]
    parts = Path(unified[0]).parts if unified else ()
    return [_CGROUP.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def cores() -> int:
    """Cores this process may use: its affinity, cut to the cgroup's quota (rounded up), at least 1."""
    granted = len(os.sched_getaffinity(0))
    for group in _own_cgroups():
        try:
            quota, period = (group / "cpu.max").read_text().split()
            granted = min(granted, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue
    quota_v1 = _number(_CGROUP / "cpu/cpu.cfs_quota_us")
    period_v1 = _number(_CGROUP / "cpu/cpu.cfs_period_us")
    if quota_v1 and period_v1 and quota_v1 > 0:
        granted = min(granted, math.ceil(quota_v1 / period_v1))
    return max(1, granted)


def _kibibytes(path: Path, key: str) -> int:
    """The bytes that a line `key:  N kB` of a file in /proc means."""
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} has no {key}")


def _group_room(group: Path) -> list[int]:
    """Bytes left under a cgroup's limits (version 2 names, then version 1); page cache counts as free."""
    room = []
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        bound, taken = _number(group / limit), _number(group / used)
        if bound is not None and taken is not None:
            room.append(max(0, bound - taken + _cached(group)))
    return room


def _cached(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def memory_available() -> int:
    """Bytes of memory a run may still take without being killed."""
    groups = [*_own_cgroups(), _CGROUP / "memory"]
    return min(
        [
            _kibibytes(_PROC / "meminfo", "MemAvailable"),
            *(room for group in groups for room in _group_room(group)),
        ]
    )


def disk_free(path: Path) -> int:
    """Bytes free for this user on the disk that holds `path`, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes.

    From VmHWM, not getrusage: `ru_maxrss` outlives exec, so it may be that of the process which started this one.
    """
    return _kibibytes(_PROC / "self/status", "VmHWM")
