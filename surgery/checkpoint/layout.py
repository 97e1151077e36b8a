"""Which files make up a checkpoint, and what their headers say; no tensor is read."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

from surgery.checkpoint.header import Header, TensorInfo, read_header
from surgery.checkpoint.jsontext import json_object
from surgery.checkpoint.reading import read_text, reading, shown
from surgery.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"

Kind = Literal["safetensors", "pickle"]
_SUFFIX: dict[Kind, str] = {"safetensors": ".safetensors", "pickle": ".bin"}


@dataclass(frozen=True)
class Shard:
    """One weight file of a checkpoint.

    Attributes:
        name: Relative to the folder, as the index writes it.
        path: Where it lies; may be a link.
        header: Its tensors.
        kind: How it is stored.
        output_name: The safetensors file that an edited copy of it becomes.
    """

    name: str
    path: Path
    header: Header
    kind: Kind
    output_name: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights whose headers were read and checked.

    Attributes:
        folder: Where it lies.
        label: What messages call it.
        shards: Sorted by name.
        tensors: Every tensor by name, in the order of the shards and of the bytes in them.
        config: config.json; empty when there is none.
        index: The parsed index; None when the weights are one file.
        notes: What a user should know about how the folder was read.
    """

    folder: Path
    label: str
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def sharded(self) -> bool:
        """Whether an index names the files."""
        return self.index is not None


@runtime_checkable
class Elsewhere(Protocol):
    """Weight files that do not lie in the checkpoint's folder."""

    @property
    def names(self) -> frozenset[str]:
        """Their names, as an index writes them."""

    def open(self, names: Sequence[str], label: str) -> list[Shard]:
        """Those of these names, in that order, with their headers read and checked."""


def _listing(folder: Path, label: str) -> set[str]:
    if not os.path.lexists(folder):
        raise InputError(f"{label} was not found; give a folder with {SINGLE} or {INDEX}")
    if not folder.is_dir() and folder.exists():
        raise InputError(f"{label} is a file, and the folder of a checkpoint is needed; give its folder")
    with reading(label):
        return set(os.listdir(folder))


def _ending(names: Iterable[str], *endings: str) -> list[str]:
    return sorted(shown(name) for name in names if name.lower().endswith(endings))


def _nothing_usable(names: set[str], label: str) -> InputError:
    """The error for a folder without weights that can be read, naming what it has and the way out."""
    found, way_out = "no weights", "give the folder of a checkpoint"
    if names & {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}:
        found, way_out = "an adapter only", "merge it into its base model first and give the merged folder"
    elif gguf := _ending(names, ".gguf"):
        found, way_out = (
            f"GGUF weights only ({gguf[0]})",
            "give the safetensors checkpoint they were made from",
        )
    elif merged := sorted(name for name in names if name.startswith("consolidated")):
        found = f"weights in their makers' format only ({shown(merged[0])})"
        way_out = "give the transformers version of the checkpoint"
    elif other := _ending(names, ".safetensors"):
        found, way_out = (
            f"{other[0]} without an index",
            f"complete the download, or name a single file {SINGLE}",
        )
    elif foreign := _ending(names, ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz"):
        found, way_out = f"another format only ({foreign[0]})", "convert it to safetensors with transformers"
    return InputError(f"{label} has {found}, and {SINGLE} or {INDEX} is needed; {way_out}")


def choose_format(names: set[str], label: str, *, allow_pickle: bool) -> tuple[Kind, bool]:
    """How the weights of a folder with these file names are stored, and whether an index names them.

    Raises:
        InputError: There are none that can be read; the message says what is there and the way out.
    """
    if names & {INDEX, SINGLE}:
        return "safetensors", INDEX in names
    if names & {PICKLE_INDEX, PICKLE_SINGLE}:
        if not allow_pickle:
            found = shown(min(names & {PICKLE_INDEX, PICKLE_SINGLE}))
            raise InputError(
                f"{label} has pickled weights only ({found}), which can hide code, and safetensors are "
                "needed; convert them, or add --allow-pickle to read their tensors without running any code"
            )
        return "pickle", PICKLE_INDEX in names
    raise _nothing_usable(names, label)


def _check_file_name(name: str, kind: Kind, where: str) -> None:
    """Refuse an index entry that is not a plain path below the folder (lexically: caches link)."""
    path = PurePosixPath(name)
    plain = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and "\\" not in name
    if not plain or "\0" in name or name == ".":
        raise InputError(
            f"{where} names the file {shown(name)}, and only plain names below its folder are read; "
            "do not trust this checkpoint"
        )
    if not name.endswith(_SUFFIX[kind]):
        raise InputError(
            f"{where} names the file {shown(name)}, and {_SUFFIX[kind]} is needed; download it again"
        )


def _weight_map(index: Mapping[str, Any], kind: Kind, where: str) -> dict[str, str]:
    """Which file each tensor is in, checked."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise InputError(f"{where} has no weight_map from tensors to files; download it again")
    if not isinstance(index.get("metadata", {}), dict):
        raise InputError(f"{where} has a metadata entry that is no object; download it again")
    for name in set(found.values()):
        _check_file_name(name, kind, where)
    return found


def _output_name(name: str, kind: Kind) -> str:
    if kind == "safetensors":
        return name
    path = PurePosixPath(name).with_suffix(".safetensors")
    return path.with_name(path.name.removeprefix("pytorch_")).as_posix()


def _shard(folder: Path, label: str, name: str, kind: Kind) -> Shard:
    path, where = folder / name, f"{label}/{shown(name)}"
    if kind == "safetensors":
        header = read_header(path, where, file=name)
    else:
        from surgery.checkpoint.pickles import pickle_header

        header = pickle_header(path, where, file=name)
    return Shard(name, path, header, kind, _output_name(name, kind))


def _collect(shards: Sequence[Shard], label: str) -> dict[str, TensorInfo]:
    """Every tensor by name."""
    tensors: dict[str, TensorInfo] = {}
    for tensor in (tensor for shard in shards for tensor in shard.header.tensors):
        if tensor.name in tensors:
            files = f"{shown(tensors[tensor.name].file)} and {shown(tensor.file)}"
            raise InputError(
                f"tensor {shown(tensor.name)} of {label} is in two files ({files}), and one is needed; "
                "download the checkpoint again"
            )
        tensors[tensor.name] = tensor
    if not tensors:
        raise InputError(f"{label} holds no tensors; give the folder of a checkpoint")
    return tensors


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse an index and shards that do not name the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"{where} puts tensor {shown(name)} into {shown(file)}, which does not hold it; "
                "download the checkpoint again"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise InputError(
                f"tensor {shown(name)} is in {shown(tensor.file)} and not in {where}, and each tensor of a "
                "shard must be indexed; download the checkpoint again"
            )


def _read_config(folder: Path, label: str, names: set[str]) -> tuple[dict[str, Any], list[str]]:
    if "config.json" not in names:
        return {}, [f"{label} has no config.json: nothing is known of its architecture"]
    where = f"{label}/config.json"
    return json_object(read_text(folder / "config.json", where), where, strict=False), []


def _read_index(folder: Path, label: str, kind: Kind) -> tuple[dict[str, Any], dict[str, str]]:
    name = INDEX if kind == "safetensors" else PICKLE_INDEX
    index = json_object(read_text(folder / name, f"{label}/{name}"), f"{label}/{name}")
    return index, _weight_map(index, kind, f"{label}/{name}")


def _check_outputs(shards: Sequence[Shard], label: str) -> None:
    if len({shard.output_name for shard in shards}) < len(shards):
        raise InputError(
            f"two files of {label} would be written under one name; convert it to safetensors first"
        )


def open_checkpoint(
    folder: Path, label: str, *, allow_pickle: bool = False, elsewhere: Elsewhere | None = None
) -> Checkpoint:
    """A checkpoint with every header read and checked, and no tensor data read.

    Args:
        folder: Holds an index and its shards, or one weight file; where both lie there, the index wins.
        label: What messages call it.
        allow_pickle: Read `pytorch_model*.bin` when there are no safetensors; no code in them is run.
        elsewhere: Weight files in safetensors that are not in the folder; the index is there all the same.

    Raises:
        InputError: Something is missing, damaged, contradictory, of another format, or unsafe.
        AccessError: There is no right to read a file.
    """
    names = _listing(folder, label) | (elsewhere.names if elsewhere else frozenset())
    kind, indexed = choose_format(names, label, allow_pickle=allow_pickle)
    config, notes = _read_config(folder, label, names)
    single = SINGLE if kind == "safetensors" else PICKLE_SINGLE
    index, weight_map = _read_index(folder, label, kind) if indexed else (None, {})
    files = sorted(set(weight_map.values()) or {single})
    if elsewhere is not None:
        shards = elsewhere.open(files, label)
    else:
        shards = [_shard(folder, label, name, kind) for name in files]
    _check_outputs(shards, label)
    tensors = _collect(shards, label)
    if index is not None:
        _check_index(weight_map, tensors, f"the index of {label}")
        if single in names and single not in weight_map.values():
            notes.append(f"{label} has an index and {single}: the index is used, {single} is not read")
    return Checkpoint(folder, label, tuple(shards), tensors, config, index, tuple(notes))
