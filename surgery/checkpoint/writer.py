"""Files of a checkpoint, written front to back and hashed on the way.

A shard's header is known before its first tensor (the plan fixes names, dtypes and shapes), so tensors are
streamed straight to their place and no more than one of them is in memory.

Beside its SHA-256, which names a file for good, each gets a fast checksum (XXH3) of what was handed to the disk: by
that the finished output is read back and checked, at a thirtieth of the cost.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from surgery.checkpoint.staging import writing
from surgery.errors import OutputError

INDEX = "model.safetensors.index.json"

# Bytes after which the disk is told to begin: at the end of a shard little is then left to wait for.
_FLUSH = 1 << 26


@dataclass(frozen=True)
class Written:
    """A file on disk: its size in bytes, SHA-256 and checksum of what was handed to the disk."""

    size: int
    sha256: str
    checksum: str


class Digests:
    """SHA-256 and checksum of bytes that go by."""

    def __init__(self) -> None:
        self._sha256, self._checksum, self._size = hashlib.sha256(), xxhash.xxh3_128(), 0

    def update(self, data: memoryview) -> None:
        """Take more bytes into account."""
        self._sha256.update(data)
        self._checksum.update(data)
        self._size += len(data)

    def written(self) -> Written:
        """What all bytes so far come to."""
        return Written(self._size, self._sha256.hexdigest(), self._checksum.hexdigest())


class ShardFile:
    """One safetensors file being written in the order of its header; use as a context manager.

    The file has the mode that the umask gives; it is on disk (fsync) when `close` returns.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self._path = path
        self._expected = size
        self._digests = Digests()
        self._header = header
        self._unflushed = 0
        self._flushing: Future[None] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")

    def __enter__(self) -> "ShardFile":
        try:
            self.write(memoryview(self._header))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._flusher.shutdown()
        self._file.close()

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            ResourceError: The disk is full.
        """
        data = data.cast("B")
        self._digests.update(data)
        self._unflushed += len(data)
        with writing(self._path):
            while data:
                data = data[self._file.write(data) :]
        self._flush()

    def _flush(self) -> None:
        """Let the disk begin with what is written, unless it is still busy."""
        if self._unflushed < _FLUSH or (self._flushing and not self._flushing.done()):
            return
        with writing(self._path):
            if self._flushing:
                self._flushing.result()
        self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())
        self._unflushed = 0

    def close(self) -> Written:
        """Make the file durable and return what was written.

        Raises:
            OutputError: Fewer or more bytes were written than the header promised.
        """
        written = self._digests.written()
        if written.size != self._expected:
            raise OutputError(
                f"{self._path.name} has {written.size} bytes where its header promises {self._expected}; "
                "this is a defect of surgery, please report it"
            )
        with writing(self._path):
            if self._flushing:
                self._flushing.result()
            os.fsync(self._file.fileno())
        self._end()
        return written


def write_file(path: Path, content: bytes) -> Written:
    """Write a small file durably and return its size and hash; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    digests = Digests()
    digests.update(memoryview(content))
    return digests.written()


def copy_file(source: Path, target: Path) -> Written:
    """Copy a side file byte for byte, links followed, and return its size and hashes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digests = Digests()
    with writing(target), open(source, "rb") as reading, open(target, "wb") as file:
        while chunk := reading.read(1 << 20):
            digests.update(memoryview(chunk))
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digests.written()


def index_bytes(shards: Mapping[str, Sequence[str]], total_size: int, metadata: Mapping[str, Any]) -> bytes:
    """The index of a sharded checkpoint, as bytes of JSON.

    Args:
        shards: Tensor names by shard file.
        total_size: Bytes of all tensors, headers not counted.
        metadata: What the source's index said besides; kept.
    """
    weight_map = {name: file for file, names in shards.items() for name in names}
    document = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(document, indent=2).encode() + b"\n"
