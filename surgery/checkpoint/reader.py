"""Tensors of one checkpoint, read one at a time into memory of their own."""

import hashlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor

from surgery.checkpoint.dtypes import torch_dtype
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.pickles import load_pickle
from surgery.checkpoint.reading import open_regular, read_exactly, reading, shown
from surgery.errors import InputError


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Reader:
    """Reads tensors of a checkpoint by name; use as a context manager.

    Safetensors files are read at the tensor's position and never memory-mapped, so what is resident is what
    was asked for, and a file that shrinks is an error and no crash. Several threads may share a reader.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._files: dict[str, FileIO] = {}
        self._pickles: dict[str, dict[str, Tensor]] = {}
        self._lock = Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._pickles.clear()

    def _label(self, shard: Shard) -> str:
        return f"{self._checkpoint.label}/{shown(shard.name)}"

    def _file(self, shard: Shard) -> FileIO:
        """The open file of a shard, its size as when its header was read."""
        with self._lock:
            if shard.name not in self._files:
                file = open_regular(shard.path, self._label(shard))
                if os.fstat(file.fileno()).st_size != shard.header.size:
                    file.close()
                    raise InputError(f"{self._label(shard)} changed after its header was read; run again")
                self._files[shard.name] = file
            return self._files[shard.name]

    def _fill(self, shard: Shard, buffer: memoryview, start: int) -> None:
        """Fill a buffer with a shard's bytes from an offset on."""
        read_exactly(self._file(shard), buffer, start, self._label(shard))

    def _pickled(self, shard: Shard, info: TensorInfo) -> Tensor:
        with self._lock:
            if shard.name not in self._pickles:
                # One at a time: the oldest kind is read whole, and memory must not grow with their number.
                self._pickles = {shard.name: load_pickle(shard.path, self._label(shard))}
            tensor = self._pickles[shard.name].get(info.name)
        if tensor is None or tensor.shape != info.shape or tensor.dtype != torch_dtype(info.dtype):
            raise InputError(f"{self._label(shard)} changed after it was first read; run again")
        return tensor

    def _find(self, name: str) -> tuple[Shard, TensorInfo]:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise InputError(f"{self._checkpoint.label} has no tensor {shown(name)}; check the name")
        return self._shards[info.file], info

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor; InputError where there is none of that name."""
        return self._find(name)[1]

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor of the stored dtype and shape.

        Raises:
            InputError: No such tensor, a dtype torch does not have, or a file that changed or ended early.
            AccessError: There is no right to read the file.
        """
        shard, info = self._find(name)
        if shard.kind == "pickle":
            return self._pickled(shard, info).clone(memory_format=torch.contiguous_format)
        dtype = torch_dtype(info.dtype)
        tensor = torch.empty(info.shape, dtype=dtype)
        if info.nbytes:
            self._fill(shard, _bytes_of(tensor), info.start)
        return tensor

    def raw(self, name: str, chunk: int = 1 << 24) -> Iterator[memoryview]:
        """The stored bytes of a tensor, front to back, in pieces of at most `chunk` bytes.

        Raises:
            InputError: No such tensor, or a file that changed or ended early.
            AccessError: There is no right to read the file.
        """
        shard, info = self._find(name)
        if shard.kind == "pickle":
            whole = _bytes_of(self._pickled(shard, info).contiguous())
            for start in range(0, info.nbytes, chunk):
                yield whole[start : start + chunk]
            return
        end = info.start + info.nbytes
        for start in range(info.start, end, chunk):
            piece = memoryview(bytearray(min(chunk, end - start)))
            self._fill(shard, piece, start)
            yield piece

    def release(self, name: str) -> None:
        """Close a shard's file, so that deleting it frees its disk; reading from it opens it again.

        Args:
            name: Of the shard, none of whose tensors is being read.
        """
        with self._lock:
            self._pickles.pop(name, None)
            if (file := self._files.pop(name, None)) is not None:
                file.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits; links are followed.

    Raises:
        InputError: It is missing or no regular file.
        AccessError: There is no right to read it.
    """
    return _digest(path, hashlib.sha256())


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes (128 bits) as 32 hexadecimal digits: fast, and no protection against intent.

    Raises:
        InputError: It is missing or no regular file.
        AccessError: There is no right to read it.
    """
    return _digest(path, xxhash.xxh3_128())


@runtime_checkable
class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def _digest(path: Path, digest: _Digest) -> str:
    buffer = memoryview(bytearray(1 << 20))
    with open_regular(path, str(path)) as file, reading(str(path)):
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
