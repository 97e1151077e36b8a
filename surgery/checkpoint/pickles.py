"""Pickled checkpoints (`pytorch_model*.bin`), read through torch's restricted unpickler: no code is run."""

import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import code_of
from surgery.checkpoint.header import Header, TensorInfo
from surgery.checkpoint.reading import open_regular, reading, shown
from surgery.errors import InputError

_ZIP = b"PK\x03\x04"
_GLOBAL = re.compile(r"(?:GLOBAL|global:?|class) ([\w.]+)")
# What torch.load was seen to raise on damaged files, its own refusals (UnpicklingError) apart.
_DAMAGED = (
    RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    AssertionError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def _is_zip(path: Path, label: str) -> bool:
    with open_regular(path, label) as file, reading(label):
        return file.read(4) == _ZIP


def _check_zip(path: Path, label: str) -> None:
    """Refuse compressed entries: torch writes none, and they can unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{label} is compressed, which torch.save never does; do not trust it")


def _load(path: Path, label: str) -> Any:
    zipped = _is_zip(path, label)
    try:
        with reading(label), warnings.catch_warnings():
            # The unpickler warns of unusual protocols; what it cannot read it refuses all the same.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            if zipped:
                _check_zip(path, label)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        what = f" ({shown(named[1])})" if named else ""
        raise InputError(
            f"{label} holds more than tensors: unpickling it would run code{what}; do not trust it, "
            "use a safetensors checkpoint"
        ) from error
    except _DAMAGED as error:
        raise InputError(
            f"{label} is damaged or no pickled checkpoint ({type(error).__name__}); download it again"
        ) from error


def _check_tensor(where: str, value: object, size: int) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise InputError(
            f"{where} is no plain tensor ({type(value).__name__}); convert it to safetensors first"
        )
    if value.numel() * value.element_size() > size:
        raise InputError(
            f"{where} claims more bytes than its file has ({size}); do not trust this checkpoint"
        )


def load_pickle(path: Path, label: str) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint by name, memory-mapped (legacy, non-zip files are read whole).

    Args:
        path: Written by `torch.save` of a state dict.
        label: Its name for messages.

    Raises:
        InputError: It holds code, or anything but plain CPU tensors by name, or is damaged.
        AccessError: There is no right to read it.
    """
    content = _load(path, label)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"{label} holds no tensors by name; convert it to safetensors first")
    with reading(label):
        size = path.stat().st_size
    for name, value in content.items():
        _check_tensor(f"{shown(name)} in {label}", value, size)
    return {name: value.detach() for name, value in content.items()}


def pickle_header(path: Path, label: str, *, file: str) -> Header:
    """What a pickled checkpoint holds, in the form of a safetensors header without bytes of its own.

    Args:
        path: Written by `torch.save` of a state dict.
        label: Its name for messages.
        file: What the tensors' `file` says.

    Raises:
        InputError: As `load_pickle`, or a dtype that safetensors cannot hold.
    """
    tensors, start = [], 0
    for name, value in load_pickle(path, label).items():
        nbytes = value.numel() * value.element_size()
        tensors.append(TensorInfo(name, code_of(value.dtype), tuple(value.shape), file, start, nbytes))
        start += nbytes
    with reading(label):
        return Header(0, b"", {}, tuple(tensors), path.stat().st_size)
