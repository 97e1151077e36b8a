"""An adapter as its files have it: which module each tensor belongs to, and as what.

A PEFT LoRA is `adapter_config.json` with `adapter_model.safetensors`; dense deltas are float32 tensors in
`delta*.safetensors`, named as the tensors they are added to. Pickles (`adapter_model.bin`) are refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from surgery.adapter_peft import PREFIX
from surgery.checkpoint.header import TensorInfo, read_header
from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.reading import shown
from surgery.errors import InputError
from surgery.hub import Source
from surgery.merging.config import CONFIG, LoraSettings, read_settings

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DENSE = "delta*.safetensors"

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|lora_magnitude_vector\.weight|lora_B\.bias)"
)
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}


@dataclass(frozen=True)
class Module:
    """The tensors that adapt one module.

    Attributes:
        name: As the model in memory calls it, wrappers of PEFT (`base_layer`) included.
        a: The name of A in the file: (r, in), for experts (E r, in).
        b: The name of B: (out, r), for experts (out, r E).
        magnitude: That of DoRA's magnitudes; None for plain LoRA.
        bias: That of B's bias; None without one.
        embedding: Whether the module looks rows up: then A is (r, rows) and B (columns, r).
    """

    name: str
    a: str
    b: str
    magnitude: str | None = None
    bias: str | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter, from its headers.

    Attributes:
        label: What messages call it.
        number: From 0, among those merged together.
        files: Its weights as a checkpoint.
        settings: Its config; None for dense deltas.
        modules: What is low-rank.
        whole: File names of tensors that replace one of the model (`modules_to_save`, biases), by its name in memory.
        dense: Names of tensors that are added; the same in the model's files.
    """

    label: str
    number: int
    files: Checkpoint
    settings: LoraSettings | None
    modules: tuple[Module, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()

    def info(self, name: str) -> TensorInfo:
        """The header entry of one of its tensors."""
        return self.files.tensors[name]

    def key(self, name: str) -> str:
        """The name of one of its tensors among those of all adapters that are merged together."""
        return f"{self.number}/{name}"


def read_adapter(source: Source, number: int = 0) -> Adapter:
    """An adapter or a folder of dense deltas, from its headers.

    Raises:
        InputError: It is neither, is pickled, or a tensor in it belongs to no kind that can be merged.
    """
    folder, label = source.folder, source.label
    if (folder / WEIGHTS).exists():
        return _lora(folder, label, number)
    if dense := sorted(path.name for path in folder.glob(DENSE)):
        return _dense(folder, label, number, dense)
    if (folder / PICKLE).exists():
        raise InputError(
            f"{label} holds {PICKLE}, a pickle, which can hide code, and {WEIGHTS} is needed; load it with PEFT "
            "where that is safe, and save it again"
        )
    raise InputError(
        f"{label} holds no adapter: {CONFIG} with {WEIGHTS}, or {DENSE}, is needed; give the folder of a PEFT adapter"
    )


def _dense(folder: Path, label: str, number: int, names: Sequence[str]) -> Adapter:
    files = _open(folder, label, names)
    for info in files.tensors.values():
        if info.dtype != "F32":
            raise InputError(
                f"{info.name} in {label} is {info.dtype}, and deltas in F32 are needed; save it so"
            )
    return Adapter(label, number, files, None, dense=tuple(files.tensors))


def _lora(folder: Path, label: str, number: int) -> Adapter:
    settings = read_settings(folder, label)
    files = _open(folder, label, [WEIGHTS])
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for info in files.tensors.values():
        _check_tensor(info, label)
        name = info.name.removeprefix(PREFIX)
        if (match := _FACTOR.fullmatch(name)) is not None:
            own = found.setdefault(match["module"], {})
            own[_PARTS[match["part"]]] = info.name
        elif "lora_" in name or "trainable_tokens" in name:
            raise InputError(
                f"{shown(info.name)} in {label} is of a kind that merge cannot fold into the weights; use PEFT"
            )
        else:
            whole[name] = info.name
    modules = tuple(_module(name, own, files, label) for name, own in found.items())
    for module in modules:
        _check_rank(module, files, settings)
    return Adapter(label, number, files, settings, modules, whole)


def _open(folder: Path, label: str, names: Sequence[str]) -> Checkpoint:
    """Weight files as a checkpoint of their own."""
    shards = tuple(_shard(folder, label, name) for name in names)
    tensors: dict[str, TensorInfo] = {}
    for info in (info for shard in shards for info in shard.header.tensors):
        if info.name in tensors:
            raise InputError(f"{shown(info.name)} is in two files of {label}; save the deltas again")
        tensors[info.name] = info
    if not tensors:
        raise InputError(f"{label} holds no tensors; give the folder of a trained adapter")
    return Checkpoint(folder, label, shards, tensors, {}, None, ())


def _shard(folder: Path, label: str, name: str) -> Shard:
    path = folder / name
    return Shard(name, path, read_header(path, f"{label}/{name}", file=name), "safetensors", name)


def _check_tensor(info: TensorInfo, label: str) -> None:
    if not info.name.startswith(PREFIX):
        raise InputError(
            f"{shown(info.name)} in {label} does not begin with {PREFIX}, as PEFT's tensors do; save it with PEFT"
        )
    if not info.is_float:
        raise InputError(
            f"{shown(info.name)} in {label} is {info.dtype}, and floats are needed; save it again"
        )


def _module(name: str, own: Mapping[str, str], files: Checkpoint, label: str) -> Module:
    """The parts of one module, complete."""
    if "a" not in own or "b" not in own:
        lone = next(iter(own.values()))
        raise InputError(f"{shown(lone)} in {label} lacks the other factor of its module; download it again")
    embedding = "lora_embedding" in own["a"]
    if embedding != ("lora_embedding" in own["b"]):
        raise InputError(f"{shown(own['a'])} in {label} belongs to another kind than {shown(own['b'])}")
    for part in ("a", "b"):
        if len(files.tensors[own[part]].shape) != 2:
            raise InputError(
                f"{shown(own[part])} in {label} is {list(files.tensors[own[part]].shape)}, and a matrix is needed; "
                "adapters of convolutions are merged by PEFT"
            )
    return Module(name, own["a"], own["b"], own.get("magnitude"), own.get("bias"), embedding)


def _check_rank(module: Module, files: Checkpoint, settings: LoraSettings) -> None:
    """Refuse factors that do not fit each other, or that have another rank than the config says."""
    one, other = files.tensors[module.a].shape, files.tensors[module.b].shape
    if one[0] != other[1] or not one[0]:
        raise InputError(
            f"{shown(module.a)} in {settings.label} is {list(one)} and {shown(module.b)} {list(other)}: their ranks "
            "differ; download the adapter again"
        )


def joined(adapters: Sequence[Adapter]) -> Checkpoint:
    """The tensors of several adapters as one checkpoint, by the names that `Adapter.key` gives."""
    shards, tensors = [], {}
    for adapter in adapters:
        shards += [replace(shard, name=adapter.key(shard.name)) for shard in adapter.files.shards]
        for info in adapter.files.tensors.values():
            name = adapter.key(info.name)
            tensors[name] = replace(info, name=name, file=adapter.key(info.file))
    label = " + ".join(adapter.label for adapter in adapters)
    return Checkpoint(adapters[0].files.folder, label, tuple(shards), tensors, {}, None, ())
