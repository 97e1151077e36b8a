"""An output folder that exists whole or not at all.

Work goes to `OUT.partial`, which is renamed to `OUT` in one step when everything in it has been checked.
The folder holds a journal: its first line is the fingerprint of the run, each further line is a piece of
work that is finished and on disk. The same run, started again, takes up after the last such line; another
run is refused. A lock on the folder keeps two runs apart; the kernel drops it when a process dies.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.errors import OutputError, ResourceError, SurgeryError, UsageError

JOURNAL = "journal.jsonl"
MANIFEST = "surgery.json"
_OTHERS = "journal-*.jsonl"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def partial_of(output: Path) -> Path:
    """The folder in which `output` is built."""
    return output.with_name(output.name + ".partial")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced: a folder this tool wrote, and `overwrite` given.

    Raises:
        UsageError: `output` exists and may not be replaced. An empty folder may always be.
    """
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{output} exists; choose another --output, or add --overwrite to replace it")
    if not (output / MANIFEST).is_file():
        raise UsageError(
            f"{output} exists and has no {MANIFEST}, so surgery did not write it; remove it yourself"
        )


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A journal line, None when it was cut short by a crash."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) else None


def _whole(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The entries of a journal up to the first line that is not whole."""
    parsed = [_parsed(line) for line in lines]
    kept = parsed[: parsed.index(None)] if None in parsed else parsed
    return [entry for entry in kept if entry is not None]


class Staging:
    """`OUT.partial` while it is being built; use as a context manager and `commit` at the end.

    An error that a rerun cannot cure removes the folder; one that it can (interruption, full disk, network)
    and any crash leave it for the next run.

    Of several processes at one run, the first opens the folder; the others then `join` it, each with a journal of
    its own, which the next run that opens the folder takes over.

    Attributes:
        path: The folder to write into.
        entries: Journal lines of earlier, interrupted runs, oldest first; empty on a fresh start.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        self.path = partial_of(output)
        self.entries: list[dict[str, Any]] = []
        self._journal = self.path / JOURNAL
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._overwrite = overwrite
        self._lock = -1

    def __enter__(self) -> "Staging":
        refuse_existing(self.output, overwrite=self._overwrite)
        self._acquire()
        try:
            self._open_journal()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SurgeryError) and not error.resumable:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"{self.path} is a file, and a folder is needed there; remove it") from None
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise UsageError(
                f"another run is writing {self.output}; wait for it, or choose another --output"
            ) from None
        if not self.path.exists() or os.stat(self.path).st_ino != os.fstat(self._lock).st_ino:
            self._release()
            raise UsageError(f"another run has just finished {self.output}; choose another --output")

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @classmethod
    def join(cls, output: Path, fingerprint: Mapping[str, Any], rank: int) -> "Staging":
        """The folder that another process of the same run has opened and holds; not a context manager.

        Raises:
            UsageError: It is not there: the processes do not share a file system.
        """
        staging = cls(output, fingerprint)
        if not staging.path.is_dir():
            raise UsageError(
                f"process {rank} does not see {staging.path}, which process 0 has made; "
                "choose an --output on a file system that all processes share"
            )
        staging._journal = staging.path / f"journal-{rank}.jsonl"
        staging._append({"fingerprint": staging._fingerprint})
        return staging

    def _open_journal(self) -> None:
        lines = self._journal.read_bytes().splitlines(keepends=True) if self._journal.exists() else []
        entries = _whole(lines)
        if entries and entries[0].get("fingerprint") == self._fingerprint:
            self.entries = entries[1:]
            self._journal.write_bytes(b"".join(lines[: len(entries)]))
            self._take_over()
            return
        if entries and not self._overwrite:
            differing = _differing(entries[0].get("fingerprint"), self._fingerprint)
            raise UsageError(
                f"{self.path} is left from another run (other {differing}); repeat that run to finish it, "
                f"remove the folder, or add --overwrite"
            )
        self._start_afresh(known=bool(lines))

    def _take_over(self) -> None:
        """Add what other processes of the interrupted run had finished to the journal."""
        for journal in sorted(self.path.glob(_OTHERS)):
            entries = _whole(journal.read_bytes().splitlines(keepends=True))
            if entries and entries[0].get("fingerprint") == self._fingerprint:
                for entry in entries[1:]:
                    self._append(entry)
                self.entries += entries[1:]
            journal.unlink()

    def _start_afresh(self, *, known: bool) -> None:
        """Empty the folder; one that holds files and neither journal nor manifest is not ours to empty."""
        if any(self.path.iterdir()) and not known and not (self.path / MANIFEST).exists():
            raise UsageError(f"{self.path} holds files that surgery did not write; remove it yourself")
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self._append({"fingerprint": self._fingerprint})

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self._journal), open(self._journal, "ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def record(self, entry: Mapping[str, Any]) -> None:
        """Add a finished piece of work to the journal; its files must be on disk (fsync) by now."""
        self._append(entry)

    def commit(self) -> None:
        """Turn `OUT.partial` into `OUT`, in one rename (or one exchange, where an old `OUT` is replaced)."""
        for journal in (self._journal, *self.path.glob(_OTHERS)):
            journal.unlink()
        fsync_folder(self.path)
        refuse_existing(self.output, overwrite=self._overwrite)
        if self.output.is_dir() and any(self.output.iterdir()):
            # The old folder is locked before it takes this name: no other run may begin in it while it is removed.
            old = os.open(self.output, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(old, fcntl.LOCK_EX)
                _exchange(self.path, self.output)
                shutil.rmtree(self.path)
            finally:
                os.close(old)
        else:
            os.rename(self.path, self.output)
        fsync_folder(self.output.parent)


def _differing(old: Any, new: Mapping[str, Any]) -> str:
    """Names of the parts in which two fingerprints differ."""
    if not isinstance(old, dict):
        return "version"
    return ", ".join(sorted(key for key in {*old, *new} if old.get(key) != new.get(key)))


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (renameat2 with RENAME_EXCHANGE, Linux 3.15)."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OutputError(f"{one} could not replace {other}: {os.strerror(code)}; rename it yourself")
    # Some network file systems cannot exchange: two renames, the old folder kept until both are done.
    aside = other.with_name(other.name + ".replaced")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


class writing:  # noqa: N801 - reads as a statement: `with writing(path): ...`
    """Within this block a full disk becomes a ResourceError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk filled up while {self._path} was written; free space and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise ResourceError(
                f"{self._path} would be larger than the file system or `ulimit -f` allows; "
                "raise the limit or choose another --output, and run the same command again"
            ) from error
