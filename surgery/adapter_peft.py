"""The format of a PEFT LoRA adapter: its config, the names and layouts of its tensors, and whether they load.

PEFT itself decides which module a config means and what its tensors are called, by rules that differ between kinds of
modules and model types. So the adapter is set up by PEFT on a model without weights (meta device), the names are read
off it, and before they are written it is checked that PEFT would load them all.

PEFT: https://github.com/huggingface/peft, versions 0.18 and later.
"""

import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.adapter_names import WAY_OUT
from surgery.errors import InputError
from surgery.spectral import Factors

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

NAME = "default"
"""What PEFT calls an adapter that was given no name."""

INJECT_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError)
"""What PEFT raises on a model or a config that it cannot adapt."""


@dataclass(frozen=True)
class Piece:
    """The edit of a block of a parameter.

    Attributes:
        factors: The edit of the block, `left` (m, k) and `right` (k, n); singular values not negative.
        row: The block's first row.
        column: The block's first column.
        expert: Which matrix of a stack; None where the parameter is one matrix.
    """

    factors: Factors
    row: int = 0
    column: int = 0
    expert: int | None = None


def block_factors(shape: Sequence[int], pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Float32 factors whose product is the sum of all pieces, each at its place: ranks add up.

    Args:
        shape: (m, n), or (E, m, n) for a stack.
        pieces: At least one.

    Returns:
        `left` (m, r) and `right` (r, n), or (E, m, r) and (E, r, n) with r the largest rank in the stack, at least
        1. Singular values are shared evenly by both.
    """
    if len(shape) == 2:
        return _matrix_factors(shape, pieces, max(1, _rank(pieces)))
    experts = [[piece for piece in pieces if piece.expert == number] for number in range(shape[0])]
    rank = max(1, *(_rank(own) for own in experts))
    pairs = [_matrix_factors(shape[1:], own, rank) for own in experts]
    return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])


def _rank(pieces: Sequence[Piece]) -> int:
    return sum(int((piece.factors.values != 0).sum()) for piece in pieces)


def _matrix_factors(
    shape: Sequence[int], pieces: Sequence[Piece], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    left, right = torch.zeros(shape[0], rank), torch.zeros(rank, shape[1])
    start = 0
    for piece in pieces:
        kept = piece.factors.values != 0
        root = piece.factors.values[kept].double().sqrt()
        one, other = piece.factors.left[:, kept] * root, root.unsqueeze(-1) * piece.factors.right[kept]
        stop = start + len(root)
        left[piece.row : piece.row + len(one), start:stop] = one
        right[start:stop, piece.column : piece.column + other.shape[1]] = other
        start = stop
    return left, right


def adapter_config(
    ranks: Mapping[str, int],
    parameters: Collection[str],
    saved: Sequence[str],
    model: nn.Module,
    *,
    tied: bool,
) -> dict[str, Any]:
    """The fields of `adapter_config.json` that decide what is adapted; the scaling of every module is 1.

    Args:
        ranks: Rank by full parameter name.
        parameters: Which of them are adapted as parameters; the others are the `weight` of a module that PEFT wraps.
        saved: Modules that the adapter carries whole.
        model: The model without weights.
        tied: Whether one of those is tied to another module.
    """
    keys = {
        name if name in parameters else name.removesuffix(".weight"): rank for name, rank in ranks.items()
    }
    modules = [key for key in keys if key not in parameters]
    largest = max(ranks.values())
    pattern = rank_pattern(keys)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _has_conv1d(model, modules),
        "init_lora_weights": True,
        "target_modules": _shortest(modules, model),
        "modules_to_save": list(saved) or None,
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if tied:
        config["ensure_weight_tying"] = True
    return config


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """One regular expression for each rank but the largest, which PEFT matches with the end of a name.

    Last names stand for all that end so, where these have one rank. One expression for each name would be slow to
    load: PEFT tries each of them on each module.
    """
    by_tail: dict[str, set[int]] = {}
    for key, rank in ranks.items():
        by_tail.setdefault(_tail(key), set()).add(rank)
    names: dict[int, set[str]] = {}
    for key, rank in ranks.items():
        names.setdefault(rank, set()).add(_tail(key) if len(by_tail[_tail(key)]) == 1 else key)
    del names[max(names)]
    return {"|".join(re.escape(name) for name in sorted(own)): rank for rank, own in sorted(names.items())}


def _tail(key: str) -> str:
    """The last name of a module; of a parameter also its module's."""
    parts = key.split(".")
    return ".".join(parts[-2:] if parts[-1] == "weight" else parts[-1:])


def raised_ranks(ranks: Mapping[str, int], parameters: Collection[str]) -> dict[str, int]:
    """Ranks that need no pattern for parameters alone: raised to that of some module, or to the largest.

    The factors are padded with zeros. PEFT follows a pattern that matches parameters only, and warns as if not.
    """
    free = {rank for name, rank in ranks.items() if name not in parameters} | {max(ranks.values())}
    return {
        name: min(other for other in free if other >= rank) if name in parameters else rank
        for name, rank in ranks.items()
    }


def _shortest(targets: Sequence[str], model: nn.Module) -> list[str]:
    """The targets' last names where these mean no other module, else their full names."""
    last = {target.rpartition(".")[2] for target in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(targets) else sorted(targets)


def _has_conv1d(model: nn.Module, modules: Sequence[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(model.get_submodule(name), Conv1D) for name in modules)


def wrapped_as_module(model: nn.Module, parameter: str) -> bool:
    """Whether PEFT's own layer for this parameter's module computes what the module would with an edited weight.

    That holds for plain linear, Conv1D and embedding layers. A subclass with a forward of its own (routers, scaled or
    shifted embeddings) is adapted by its parameter, which is exact whatever its forward does.
    """
    from transformers.pytorch_utils import Conv1D

    name, _, leaf = parameter.rpartition(".")
    forward = type(model.get_submodule(name)).forward
    return leaf == "weight" and forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward)


class Adapted:
    """A model without weights, with the adapter that a config describes set up by PEFT.

    Args:
        config: The fields of `adapter_config.json`.
        ranks: What the config must come to: rank by full parameter name.
        model: The model; changed.

    Raises:
        InputError: PEFT cannot adapt this model so, or would adapt something else.
    """

    def __init__(self, config: Mapping[str, Any], ranks: Mapping[str, int], model: nn.Module) -> None:
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A copy, since PEFT changes what it is given.
            own = LoraConfig(**json.loads(json.dumps(dict(config))))
            self._model: Any = get_peft_model(model, own, low_cpu_mem_usage=True)
        self._layers = self._find_layers()
        self.missed = [name for name, rank in ranks.items() if not self._is_as_asked(name, rank)]
        whole = {name.rpartition(".")[0] for name in self.saved().values()}
        self.missed += [name for name in config["modules_to_save"] or () if name not in whole]
        self.extra = sorted(self._layers.keys() - ranks.keys())

    def _find_layers(self) -> dict[str, tuple[str, Any]]:
        """Name in the adapted model, and layer, of each adapted parameter."""
        from peft.tuners.lora import LoraLayer

        found = {}
        for name, layer in self._model.named_modules():
            if isinstance(layer, LoraLayer):
                # Several parameters of one module are adapted by layers around each other.
                module = name.removeprefix(PREFIX).replace(".base_layer", "")
                found[f"{module}.{getattr(layer, 'parameter_name', 'weight')}"] = name, layer
        return found

    def _is_as_asked(self, parameter: str, rank: int) -> bool:
        _, layer = self._layers.get(parameter, ("", None))
        return layer is not None and layer.r[NAME] == rank and layer.scaling[NAME] == 1.0

    def lora_tensors(self, parameter: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """The adapter's tensors for one edited parameter, by their names in the file.

        Args:
            parameter: Its full name in the model.
            left: (m, r), or (E, m, r) for a stack of experts.
            right: (r, n), or (E, r, n).
        """
        name, layer = self._layers[parameter]
        missing = layer.r[NAME] - left.shape[-1]
        left, right = nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))
        if NAME in layer.lora_embedding_A:
            tensors = {"lora_embedding_A": left.mT, "lora_embedding_B": right.mT}
        else:
            one, other = (
                _stacked(layer, parameter, left, right) if left.dim() == 3 else _plain(layer, left, right)
            )
            tensors = {"lora_A.weight": one, "lora_B.weight": other}
        return {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}

    def saved(self) -> dict[str, str]:
        """Parameter by name in the file, for every module that the adapter carries whole."""
        from peft.utils import ModulesToSaveWrapper

        return {
            f"{name}.{key}": f"{name.removeprefix(PREFIX)}.{key}"
            for name, module in self._model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
            for key in module.adapter_state_dict_load_map(NAME)
        }

    def require_loads(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise InputError unless tensors of these names and shapes fill the whole adapter."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        wanted = get_peft_model_state_dict(self._model, self._model.state_dict(), save_embedding_layers=False)
        expected = {name: tuple(value.shape) for name, value in wanted.items()}
        given = {name: tuple(shape) for name, shape in shapes.items()}
        wrong = sorted(
            name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)
        )
        if not wrong:
            empty = {name: torch.empty(shape, device="meta") for name, shape in given.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = set_peft_model_state_dict(self._model, empty, low_cpu_mem_usage=True)
            wrong = sorted(result.unexpected_keys)
        if wrong:
            raise InputError(
                f"PEFT expects {wrong[0]} as {expected.get(wrong[0])}, the edit has {given.get(wrong[0])}; {WAY_OUT}"
            )


def _plain(layer: Any, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a matrix; Conv1D stores it transposed."""
    return (left.mT, right.mT) if getattr(layer, "is_target_conv_1d_layer", False) else (right, left)


def _stacked(layer: Any, parameter: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a stack of experts: in A an expert's rows are together, in B its columns lie E apart."""
    if getattr(layer.get_base_layer(), "is_transposed", False):
        if len(left) == 1:
            raise InputError(
                f"{parameter} is one expert stored transposed, which PEFT cannot adapt; {WAY_OUT}"
            )
        left, right = right.mT, left.mT
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


def adapt(
    ranks: Mapping[str, int], saved: Sequence[str], build: Callable[[], nn.Module], *, tied: bool
) -> tuple[dict[str, Any], Adapted]:
    """The config of an adapter and the model adapted by it.

    Modules are adapted as modules where PEFT's layer for them is exact. Where PEFT reads such a target as something
    else (for some model types it takes `gate_proj` for a part of fused experts), it is named as a parameter.

    Args:
        ranks: Rank by full parameter name.
        saved: Modules to carry whole.
        build: Makes the model without weights.
        tied: Whether one of the saved modules is tied to another.

    Raises:
        InputError: PEFT cannot adapt this model so; the message names a parameter.
    """
    model = build()
    parameters = {name for name in ranks if not wrapped_as_module(model, name)}
    found = _try(ranks, parameters, saved, model, tied=tied)
    if isinstance(found, _Failure):
        model = build()
        linear = {name for name in found.missed if _is_linear(model, name)}
        found = _try(ranks, parameters | linear, saved, model, tied=tied)
    if isinstance(found, _Failure):
        raise InputError(f"PEFT cannot adapt {found.missed[0]} ({found.reason}); {WAY_OUT}")
    return found


def _is_linear(model: nn.Module, parameter: str) -> bool:
    module, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(module), nn.Linear)


@dataclass(frozen=True)
class _Failure:
    """Parameters that PEFT did not adapt as asked (at least one), and why."""

    missed: tuple[str, ...]
    reason: str


def _try(
    ranks: Mapping[str, int],
    parameters: Collection[str],
    saved: Sequence[str],
    model: nn.Module,
    *,
    tied: bool,
) -> tuple[dict[str, Any], Adapted] | _Failure:
    ranks = raised_ranks(ranks, parameters)
    config = adapter_config(ranks, parameters, saved, model, tied=tied)
    try:
        adapted = Adapted(config, ranks, model)
    except INJECT_ERRORS as error:
        return _Failure(tuple(ranks), str(error).strip().partition("\n")[0][:200])
    if missed := tuple(adapted.missed or adapted.extra):
        return _Failure(missed, "its rules take the name for another module")
    return config, adapted
