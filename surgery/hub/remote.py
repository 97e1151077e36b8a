"""Checkpoints whose weights stay on the Hub: their headers come by range requests, and no tensor's byte does."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.header import header_by
from surgery.checkpoint.layout import Checkpoint, Shard, open_checkpoint
from surgery.checkpoint.reading import shown
from surgery.errors import InputError
from surgery.hub.answers import label_of
from surgery.hub.ranges import read_bytes
from surgery.hub.source import RemoteFile, Source

_AT_ONCE = 8
"""Headers asked for at the same time: a large model has some hundred shards, and each waits for two answers."""


@dataclass(frozen=True)
class RemoteShard(Shard):
    """A weight file on the Hub.

    Attributes:
        remote: Which. `path` is where `surgery.hub.fetch` would put it.
    """

    remote: RemoteFile


class _Remote:
    """The weight files that a source left on the Hub."""

    def __init__(self, source: Source) -> None:
        self._folder = source.folder
        self._files = {file.name: file for file in source.weights}

    @property
    def names(self) -> frozenset[str]:
        """Paths in the repository."""
        return frozenset(self._files)

    def open(self, names: Sequence[str], label: str) -> list[Shard]:
        """These files with their headers read, several at a time."""
        if lacking := [name for name in names if name not in self._files]:
            raise InputError(
                f"{label} has no {shown(lacking[0])}, which its index names; choose another revision of it"
            )
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="surgery-headers") as pool:
            return list(pool.map(self._shard, names))

    def _shard(self, name: str) -> Shard:
        file = self._files[name]
        header = header_by(
            lambda start, size: read_bytes(file, start, size), file.size, label_of(file), file=name
        )
        return RemoteShard(name, self._folder / Path(name), header, "safetensors", name, file)


def open_source(source: Source, *, allow_pickle: bool = False) -> Checkpoint:
    """A source's checkpoint with every header read and checked, wherever its weights are; no tensor is read.

    Of weights on the Hub the 8 bytes of the length and the header are read. Their shards are `RemoteShard`s;
    after `surgery.hub.fetch(source)` they can be read as those of a folder.

    Raises:
        InputError: Something is missing, damaged, contradictory, of another format, unsafe, or has changed.
        AccessError: The Hub, the network or the rights do not allow it.
    """
    remote = _Remote(source) if source.weights else None
    return open_checkpoint(source.folder, source.label, allow_pickle=allow_pickle, elsewhere=remote)


def recorded_sha256(shard: Shard) -> str | None:
    """The SHA-256 of a shard as the Hub states it, not measured; None for local files and where it states none."""
    return shard.remote.sha256 if isinstance(shard, RemoteShard) else None


def disk_need(shards: Iterable[Shard], ahead: int = 1) -> int:
    """Bytes of disk that streaming these shards takes: the `1 + ahead` largest that are on the Hub."""
    sizes = sorted(shard.header.size for shard in shards if isinstance(shard, RemoteShard))
    return sum(sizes[-(1 + ahead) :])
