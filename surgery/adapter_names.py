"""Where the tensors of a checkpoint's files lie in the model that transformers builds from its config.

An adapter names modules of the model in memory. Their names may differ from those in the files: a prefix is missing,
a module was renamed, or matrices that are stored one by one (experts, the parts of a projection) are one parameter in
memory. The model is built on the meta device, so it holds no weights, and no code from the checkpoint runs.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.errors import InputError

WAY_OUT = "leave out --as-lora to write a model instead"

# What building a model from a config that it does not understand raises.
_BUILD_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    OSError,
)
# Fields of a config that do not change the logits of the same weights for the same tokens.
_INERT = frozenset(
    ("_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
     "max_position_embeddings", "pad_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
     "transformers_version", "use_cache")
)  # fmt: skip
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Ways in which transformers makes one parameter of several tensors that blocks of factors can follow: rows on rows
# (the second axis, once experts are stacked), matrices stacked to experts.
_LAYOUTS = (
    (("Concatenate", 0),),
    (("MergeModulelist", 0),),
    (("MergeModulelist", 0), ("Concatenate", 1)),
)


@dataclass(frozen=True)
class Place:
    """The part of a parameter that a tensor of the files becomes.

    Attributes:
        parameter: Full name in the model.
        expert: Index along the parameter's first axis; None where the tensor has every axis of the parameter.
        row: Where its rows start in the (expert's) matrix.
        whole: Whether the tensor is the whole parameter.
    """

    parameter: str
    expert: int | None = None
    row: int = 0
    whole: bool = True


def model_config(checkpoint: Checkpoint, way_out: str = WAY_OUT) -> Any:
    """The transformers config of a checkpoint.

    Args:
        checkpoint: Its config.json is read.
        way_out: What errors advise.

    Raises:
        InputError: transformers does not know this architecture, or only with code from the checkpoint.
    """
    from transformers import AutoConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoConfig.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
    except _BUILD_ERRORS as error:
        raise _no_model(checkpoint, error, way_out) from None


def build_model(checkpoint: Checkpoint, way_out: str = WAY_OUT) -> nn.Module:
    """The causal language model of a checkpoint on the meta device: modules and shapes, no weights.

    Args:
        checkpoint: Its config is read.
        way_out: What errors advise.

    Raises:
        InputError: transformers has no such class, or only with code from the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    config = model_config(checkpoint, way_out)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model
    except _BUILD_ERRORS as error:
        raise _no_model(checkpoint, error, way_out) from None


def _no_model(checkpoint: Checkpoint, error: Exception, way_out: str) -> InputError:
    kind = checkpoint.config.get("model_type", "no model_type")
    reason = str(error).strip().partition("\n")[0][:200]
    return InputError(
        f"{checkpoint.label} ({kind}) cannot be built by transformers without running its own code, and an adapter "
        f"needs its module names ({reason}); {way_out}"
    )


def require_same_config(aligned: Checkpoint, base: Checkpoint) -> None:
    """Refuse a pair whose configs would give other logits from the same weights.

    Raises:
        InputError: Naming the first such field.
    """
    one, other = (_flat(model_config(checkpoint).to_dict()) for checkpoint in (aligned, base))
    # These two scale positions by the length that the config names.
    stretched = any(
        key.endswith("rope_type") and value in ("dynamic", "longrope") for key, value in one.items()
    )
    inert = _INERT - {"max_position_embeddings"} if stretched else _INERT
    for key in sorted(one.keys() | other.keys()):
        if inert.isdisjoint(key.split(".")) and one.get(key) != other.get(key):
            raise InputError(
                f"config.json has {key} = {one.get(key)} in the aligned checkpoint and {other.get(key)} in the base, "
                f"which an adapter on the base cannot carry; use --anchor aligned, or {WAY_OUT}"
            )


def _flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def tied_parameters(model: nn.Module) -> frozenset[str]:
    """Names of parameters that share their memory with another."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return frozenset(name for group in names.values() if len(group) > 1 for name in group)


class Names:
    """Places of all tensors of a checkpoint's files in a model.

    Args:
        tensors: Of the files.
        model: Without weights; not changed and not kept.
        way_out: What errors advise; by default to leave the tensor out, or to write a model instead of an adapter.

    Raises:
        InputError: Two tensors become the same parameter.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], model: nn.Module, way_out: str | None = None
    ) -> None:
        self._tensors, self._way_out = tensors, way_out
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict(keep_vars=True).items()}
        self._converted: dict[str, _Converted] = {}
        self._direct = self._rename(model)
        self._rows = self._row_offsets()

    def _rename(self, model: nn.Module) -> dict[str, str]:
        """The parameter that each tensor becomes, by the rules with which transformers loads files."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict(keep_vars=True)
        direct = {}
        # Some rules depend on tensors seen before, so the order is the one in which transformers takes them.
        for name in sorted(self._tensors, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if pattern is None:
                direct[name] = parameter
                continue
            rule = next(rule for rule in converters if pattern in rule.source_patterns)
            self._converted[name] = _Converted(
                parameter, rule.operations, rule.source_patterns.index(pattern)
            )
        return direct

    def _row_offsets(self) -> dict[str, int]:
        """Where each tensor starts that is stacked on others to make a matrix."""
        ends: dict[tuple[str, str], int] = {}
        rows = {}
        for name, found in sorted(self._converted.items(), key=lambda item: item[1].part):
            matrix = found.parameter, "".join(_EXPERT.findall(name))
            rows[name] = ends.get(matrix, 0)
            ends[matrix] = rows[name] + (self._tensors[name].shape or (0,))[0]
        return rows

    def stored(self) -> dict[str, str]:
        """The tensor that becomes each parameter, by the parameter's name, where it is one tensor.

        Raises:
            InputError: Two tensors become the same parameter.
        """
        found: dict[str, str] = {}
        for name, parameter in self._direct.items():
            if parameter in self._shapes and found.setdefault(parameter, name) != name:
                raise InputError(
                    f"{name} and {found[parameter]} are the same parameter in the model; {self._way_out or WAY_OUT}"
                )
        return found

    def sources(self, parameter: str) -> dict[str, Place]:
        """The tensors that a parameter is made of, with the part of it that each becomes.

        Raises:
            InputError: One is stored in another shape or layout.
        """
        names = [name for name, own in self._direct.items() if own == parameter]
        names += [name for name, own in self._converted.items() if own.parameter == parameter]
        return {name: place for name in names if (place := self.place(name)) is not None}

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter in the model; empty where there is none of that name."""
        return self._shapes.get(parameter, ())

    def _advice(self, name: str) -> str:
        return self._way_out or _exclude(name)

    def place(self, name: str) -> Place | None:
        """Where a tensor lies; None where the model has no such parameter.

        Raises:
            InputError: The model has the parameter in another shape or layout.
        """
        if name in self._converted:
            return self._converted_place(name)
        parameter = self._direct[name]
        if parameter not in self._shapes:
            return None
        if self._tensors[name].shape != self._shapes[parameter]:
            raise InputError(
                f"{name} is {list(self._tensors[name].shape)} in the files and {list(self._shapes[parameter])} in "
                f"the model that the config.json of the adapter's anchor describes; {self._advice(name)}"
            )
        return Place(parameter)

    def _converted_place(self, name: str) -> Place:
        found, shape = self._converted[name], self._tensors[name].shape
        expert = _EXPERT.search(name)
        steps = tuple((type(step).__name__, getattr(step, "dim", None)) for step in found.operations)
        if steps not in _LAYOUTS or ("MergeModulelist" in steps[0]) != bool(expert):
            raise InputError(
                f"{name} is stored in another layout than the model holds it in; {self._advice(name)}"
            )
        whole, row = self._shapes.get(found.parameter, ()), self._rows[name]
        fits = len(shape) == 2 and len(whole) == 2 + bool(expert)
        if not fits or whole[-1] != shape[1] or row + shape[0] > whole[-2]:
            raise InputError(
                f"{name} {list(shape)} does not fit {found.parameter} {list(whole)}; {self._advice(name)}"
            )
        return Place(found.parameter, int(expert[1]) if expert else None, row, whole=False)


@dataclass(frozen=True)
class _Converted:
    """A tensor that becomes part of a parameter: of which, by which of transformers' operations, as which part."""

    parameter: str
    operations: Sequence[Any]
    part: int


def _exclude(name: str) -> str:
    pattern = "experts" if _EXPERT.search(name) else re.escape(name)
    return f"leave it out (--exclude '{pattern}'), or {WAY_OUT}"


def nowhere(name: str) -> InputError:
    """The error for an edited tensor that is no parameter of the model."""
    return InputError(
        f"{name} is edited, but the model class has no such parameter, so no adapter can hold it; {_exclude(name)}"
    )
