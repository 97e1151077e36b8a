"""Headers of safetensors files, read from untrusted files and written as the safetensors library does.

The format (safetensors README): 8 bytes little-endian length N, N bytes of JSON padded with spaces, then the
tensors' bytes one after the other, without gaps.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from surgery.checkpoint.dtypes import BITS, FLOAT
from surgery.checkpoint.jsontext import json_object
from surgery.checkpoint.reading import LARGEST_TEXT, open_regular, read_exactly, shown
from surgery.errors import InputError

_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}
_LARGEST = 2**63 - 1
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        name: Unique in its checkpoint.
        dtype: A safetensors code, such as "BF16".
        shape: Sizes of its dimensions; empty for a scalar.
        file: Name of its shard, relative to the checkpoint's folder, with "/" between folders.
        start: Offset of its first byte in the file; for a pickle, in the safetensors data it would make.
        nbytes: Bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers of 16 bits or more."""
        return self.dtype in FLOAT


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        length: Bytes before the first tensor, the 8 of the length included; 0 for a pickle.
        raw: Those bytes; empty for a pickle.
        metadata: The free text entries.
        tensors: In the order of their bytes.
        size: Bytes of the file.
    """

    length: int
    raw: bytes
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    size: int


def _header_length(label: str, first: bytes, size: int) -> int:
    """Bytes of a file's JSON, checked before anything of that size is allocated."""
    if len(first) < 8:
        raise InputError(
            f"{label} is truncated: {size} bytes, and 8 are needed for the length alone; download it again"
        )
    length = int.from_bytes(first[:8], "little")
    if length > LARGEST_TEXT:
        raise InputError(
            f"{label} claims a header of {length} bytes, and at most {LARGEST_TEXT} are allowed; "
            "it is damaged or no safetensors file: download it again"
        )
    if length > size - 8:
        raise InputError(
            f"{label} is truncated: its header alone needs {length + 8} bytes, it has {size}; download again"
        )
    return length


def _metadata(label: str, entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InputError(f"{label} has a {_METADATA} that does not map text to text; write the file again")
    return entry


def _naturals(entry: Any) -> bool:
    return isinstance(entry, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in entry)


def _check_fields(where: str, entry: Any) -> None:
    """Types and ranges of one tensor's entry."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise InputError(
            f"{where} is not described by dtype, shape and data_offsets alone; download it again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where} has the unknown dtype {shown(str(dtype))}; known are {', '.join(BITS)}")
    if not _naturals(shape) or len(shape) > _MOST_DIMENSIONS or prod(filter(None, shape)) > _LARGEST:
        raise InputError(f"{where} has the impossible shape {shown(str(shape))}; download it again")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where} has the impossible data_offsets {shown(str(offsets))}; download it again")


def _tensor(label: str, file: str, name: str, entry: Any, length: int) -> TensorInfo:
    where = f"tensor {shown(name)} in {label}"
    _check_fields(where, entry)
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise InputError(
            f"{where} takes {end - begin} bytes, and {dtype} of shape {list(shape)} needs {bits / 8:g}; "
            "download it again"
        )
    return TensorInfo(name, dtype, shape, file, length + begin, end - begin)


def _check_cover(label: str, tensors: Sequence[TensorInfo], length: int, size: int) -> None:
    """Refuse bytes that belong to no tensor or to two, and a file shorter or longer than its header says."""
    expected = length
    for tensor in tensors:
        if tensor.start != expected:
            fault = "overlaps the one before it" if tensor.start < expected else "leaves a gap before it"
            raise InputError(
                f"tensor {shown(tensor.name)} in {label} {fault} (starts at byte {tensor.start}, "
                f"and {expected} is needed); download it again"
            )
        expected = tensor.start + tensor.nbytes
    if size < expected:
        raise InputError(
            f"{label} is truncated: {size} bytes, and its header needs {expected}; download it again"
        )
    if size > expected:
        raise InputError(
            f"{label} has {size - expected} bytes after its last tensor, and none is allowed; download again"
        )


def parse_header(label: str, head: bytes, size: int, *, file: str = "") -> Header:
    """The header that the first bytes of a file hold, fully checked.

    Args:
        label: The file's name for messages.
        head: Its first bytes, at least up to the end of the header.
        size: Bytes of the whole file.
        file: What the tensors' `file` says.

    Raises:
        InputError: Anything in it is malformed, or does not agree with the file's size.
    """
    length = 8 + _header_length(label, head, size)
    if head[8:9] != b"{":
        raise InputError(f"{label} has no JSON header, so it is no safetensors file; download it again")
    entries = json_object(bytes(head[8:length]), f"the header of {label}")
    metadata = _metadata(label, entries.pop(_METADATA, {}))
    tensors = [_tensor(label, file, name, entry, length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_cover(label, tensors, length, size)
    return Header(length, bytes(head[:length]), metadata, tuple(tensors), size)


def header_by(read: Callable[[int, int], bytes], size: int, label: str, *, file: str) -> Header:
    """The header of a safetensors file, fully checked, from its length and itself, wherever the file is.

    Args:
        read: The bytes from an offset on, exactly as many as asked for.
        size: Bytes of the file.
        label: Its name for messages.
        file: What the tensors' `file` says.

    Raises:
        InputError: It is truncated or malformed.
    """
    first = read(0, min(8, size))
    length = _header_length(label, first, size)
    return parse_header(label, first + read(8, length), size, file=file)


def read_header(path: Path, label: str, *, file: str | None = None) -> Header:
    """The header of a safetensors file, fully checked; no tensor is read.

    Args:
        path: The file; links are followed.
        label: Its name for messages.
        file: What the tensors' `file` says; the path's last part by default.

    Raises:
        InputError: It is missing, truncated or malformed.
        AccessError: There is no right to read it.
    """
    with open_regular(path, label) as opened:

        def read(start: int, size: int) -> bytes:
            content = bytearray(size)
            read_exactly(opened, memoryview(content), start, label)
            return bytes(content)

        size = os.fstat(opened.fileno()).st_size
        return header_by(read, size, label, file=path.name if file is None else file)


def build_header(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a safetensors file, up to its first tensor, as the safetensors library writes them.

    Args:
        tensors: Name, dtype code, shape and bytes of each, in the order of their bytes.
        metadata: Text by text; left out when empty.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        start, end = end, end + nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
