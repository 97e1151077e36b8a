"""What the inputs of a run are, exactly: fingerprints that tell whether they changed, and hashes.

The fingerprint costs no tensor data (header hashes, sizes, times), so that a rerun can decide at once whether
it may take up where another run stopped. The SHA-256 of each shard is taken as the shard is first needed,
journalled, and compared when an interrupted run is resumed.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.reader import file_sha256
from surgery.checkpoint.writer import INDEX
from surgery.errors import InputError
from surgery.hub import Source
from surgery.hub.remote import RemoteShard, recorded_sha256


def checkpoint_fingerprint(
    checkpoint: Checkpoint, source: Source, sidecars: Iterable[str] = ()
) -> dict[str, Any]:
    """What identifies a checkpoint without reading its tensors.

    Per shard the SHA-256 of its header, its size, and its time of change or, from the Hub, the commit.
    """
    files = {
        shard.name: [hashlib.sha256(shard.header.raw).hexdigest(), *_shard_stamp(shard, source)]
        for shard in checkpoint.shards
    }
    side = {name: _stamp(checkpoint.folder / name, source) for name in sidecars}
    return {"source": source.label, "shards": files, "sidecars": side}


def _shard_stamp(shard: Shard, source: Source) -> list[Any]:
    """Of a file from the Hub by its commit, so that one that is streamed needs not to be on disk."""
    return [shard.header.size, source.commit] if source.commit else _stamp(shard.path, source)


def _stamp(path: Path, source: Source) -> list[Any]:
    status = path.stat()
    return [status.st_size, source.commit or status.st_mtime_ns]


class InputHashes:
    """SHA-256 of every input file, taken at most once in a run and compared with an earlier run's.

    Use as a context manager: hashes are taken on threads of their own, beside the work on the tensors.

    Args:
        checkpoints: By role, "base" and "aligned".
        known: Hashes an interrupted run journalled, by "role/file".
        record: Called with each new hash, to journal it.

    Attributes:
        taken: Hashes compared so far, by "role/file"; those that other processes have taken may be added.
        measured: What a hash is had from: by default the file, or what the Hub states of one that is not on disk.
    """

    measured: Callable[[str, Shard], str]

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        known: Mapping[str, str],
        record: Callable[[str, str], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._known = known
        self._record = record
        self._begun: dict[str, Future[str]] = {}
        self.taken: dict[str, str] = {}
        self.measured = _measured
        self._pool = ThreadPoolExecutor(len(checkpoints), thread_name_prefix="hash")

    def __enter__(self) -> "InputHashes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, role: str, shard: Shard) -> None:
        """Start hashing a shard, unless that was done before."""
        key = f"{role}/{shard.name}"
        if key not in self._begun:
            self._begun[key] = self._pool.submit(self._known_or_measured, role, shard)

    def _known_or_measured(self, role: str, shard: Shard) -> str:
        """A streamed file whose shard is finished is not there to be hashed again."""
        known = self._known.get(f"{role}/{shard.name}")
        gone = known is not None and isinstance(shard, RemoteShard) and not shard.path.exists()
        return known if known is not None and gone else self.measured(role, shard)

    def take(self, role: str, shard: Shard) -> str:
        """The SHA-256 of a shard.

        Raises:
            InputError: An interrupted run read other bytes from this file.
        """
        key = f"{role}/{shard.name}"
        if key not in self.taken:
            self.begin(role, shard)
            found = self._begun[key].result()
            if self._known.get(key, found) != found:
                raise InputError(
                    f"{shard.name} of the {role} checkpoint has changed since the interrupted run read it; "
                    "what was half done is removed, run the command again to start afresh"
                )
            if key not in self._known:
                self._record(key, found)
            self.taken[key] = found
        return self.taken[key]

    def all(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Size and hash of every weight file of both checkpoints, indexes included, by role and name."""
        for role, checkpoint in self._checkpoints.items():
            for shard in checkpoint.shards:
                if f"{role}/{shard.name}" not in self.taken:
                    self.begin(role, shard)
        return {role: self._files(role, checkpoint) for role, checkpoint in self._checkpoints.items()}

    def _files(self, role: str, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        files = {
            shard.name: {"size": shard.header.size, "sha256": self.take(role, shard)}
            for shard in checkpoint.shards
        }
        if checkpoint.index is not None and (index := checkpoint.folder / INDEX).exists():
            files[INDEX] = {"size": index.stat().st_size, "sha256": file_sha256(index)}
        return dict(sorted(files.items()))


def _measured(role: str, shard: Shard) -> str:
    """The SHA-256 of a shard's file, or what the Hub states where it is not on disk."""
    if not isinstance(shard, RemoteShard) or shard.path.exists():
        return file_sha256(shard.path)
    stated = recorded_sha256(shard)
    if stated is None:
        raise InputError(
            f"the Hub states no SHA-256 of {shard.name} of the {role} model; run without --stream"
        )
    return stated
