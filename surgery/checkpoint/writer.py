"""Files of a checkpoint, written front to back and hashed on the way.

A shard's header is known before its first tensor (the plan fixes names, dtypes and shapes), so tensors are
streamed straight to their place and no more than one of them is in memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from surgery.checkpoint.staging import writing
from surgery.errors import OutputError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Written:
    """A file on disk: its size in bytes and SHA-256 of what was handed to the disk."""

    size: int
    sha256: str


class ShardFile:
    """One safetensors file being written in the order of its header; use as a context manager.

    The file has the mode that the umask gives; it is on disk (fsync) when `close` returns.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self._path = path
        self._expected = size
        self._hash = hashlib.sha256()
        self._size = 0
        self._header = header
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "ShardFile":
        try:
            self.write(memoryview(self._header))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            ResourceError: The disk is full.
        """
        data = data.cast("B")
        self._hash.update(data)
        self._size += len(data)
        with writing(self._path):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> Written:
        """Make the file durable and return what was written.

        Raises:
            OutputError: Fewer or more bytes were written than the header promised.
        """
        if self._size != self._expected:
            raise OutputError(
                f"{self._path.name} has {self._size} bytes where its header promises {self._expected}; "
                "this is a defect of surgery, please report it"
            )
        with writing(self._path):
            os.fsync(self._file.fileno())
        self._file.close()
        return Written(self._size, self._hash.hexdigest())


def write_file(path: Path, content: bytes) -> Written:
    """Write a small file durably and return its size and hash; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(content), hashlib.sha256(content).hexdigest())


def copy_file(source: Path, target: Path) -> Written:
    """Copy a side file byte for byte, links followed, and return its size and hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target), open(source, "rb") as reading, open(target, "wb") as file:
        shutil.copyfileobj(reading, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    with open(target, "rb") as copied:
        return Written(target.stat().st_size, hashlib.file_digest(copied, "sha256").hexdigest())


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
