"""Where a causal language model keeps its decoder blocks, found by structure and checked.

No name is guessed. The decoder is the one module that has the input embeddings and a list of as many blocks as the
config counts among its own children; inside a block, attention is the one child with matrices that is a class of
attention, and the feed-forward part is the other children with matrices. What does not fit is refused by name, so
that no method trains or perturbs half of a model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """The parts of a decoder-only language model.

    Attributes:
        embeddings: The input embeddings.
        stack: The decoder, which holds embeddings and blocks.
        list_name: The attribute of `stack` that is the list of blocks.
        layers: The decoder blocks, first to last.
        attention: The attention module of every block.
        mlp: The other modules with matrices of every block: one feed-forward module or mixture of experts, or bare
            linear modules (OPT).
        final_norm: The norm after the last block; None where the decoder has none.
        hidden_size: Width of the residual stream.
    """

    embeddings: nn.Module
    stack: nn.Module
    list_name: str
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[tuple[nn.Module, ...], ...]
    final_norm: nn.Module | None
    hidden_size: int


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of wrappers of torch (DDP, compiled) and of PEFT; adapters inside it stay."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(base := _base_of_adapters(model), nn.Module):
            return base
        else:
            return model


def _base_of_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else None


def find(model: nn.Module) -> Blocks:
    """The parts of a causal language model of transformers, bare or wrapped by PEFT or DDP.

    Raises:
        InputError: A part is missing or not unique; the message names it.
    """
    inner: Any = unwrapped(model)
    title = type(inner).__name__
    config = getattr(inner, "config", None)
    if config is None or not callable(getattr(inner, "get_input_embeddings", None)):
        raise InputError(f"{title} has no config or no input embeddings; a transformers model is needed")
    config = config.get_text_config()
    embeddings = inner.get_input_embeddings()
    stack, list_name = _stack(inner, embeddings, config.num_hidden_layers, title)
    layers = tuple(getattr(stack, list_name))
    parts = [_parts(layer, f"block {index} of {title}") for index, layer in enumerate(layers)]
    return Blocks(
        embeddings=embeddings,
        stack=stack,
        list_name=list_name,
        layers=layers,
        attention=tuple(attention for attention, _ in parts),
        mlp=tuple(mlp for _, mlp in parts),
        final_norm=_final_norm(stack, list_name),
        hidden_size=config.hidden_size,
    )


def linear_names(model: nn.Module, layers: Sequence[int]) -> list[str]:
    """The full names, within the model given, of every linear module of these blocks, in the model's order.

    Linear is `nn.Linear` and the transposed `Conv1D` of GPT-2. A gate with a single output is left out; experts held
    as one 3-D parameter are no modules and are not listed.

    Raises:
        InputError: The model is not understood, or these blocks have no linear module.
    """
    found = find(model)
    chosen = {id(part) for index in layers for part in found.layers[index].modules() if _is_linear(part)}
    names = [name for name, module in model.named_modules() if id(module) in chosen]
    if not names:
        raise InputError(f"{type(unwrapped(model)).__name__} has no linear module in the blocks {[*layers]}")
    return names


@contextmanager
def shortened(blocks: Blocks, count: int) -> Iterator[None]:
    """The model with only its first `count` blocks, inside the with-block; the final norm follows the last one."""
    whole = getattr(blocks.stack, blocks.list_name)
    setattr(blocks.stack, blocks.list_name, nn.ModuleList(blocks.layers[:count]))
    try:
        yield
    finally:
        setattr(blocks.stack, blocks.list_name, whole)


def _stack(model: nn.Module, embeddings: nn.Module, depth: int, title: str) -> tuple[nn.Module, str]:
    """The decoder and the attribute that holds its blocks."""
    holders = [
        module for module in model.modules() if any(child is embeddings for child in module.children())
    ]
    found = [
        (holder, name)
        for holder in holders
        for name, child in holder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(found) != 1:
        raise InputError(
            f"{title} has {len(found)} lists of {depth} blocks beside its input embeddings; exactly one is needed: "
            "this architecture cannot be trained here"
        )
    return found[0]


def _parts(layer: nn.Module, title: str) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """Attention and feed-forward modules of one block."""
    heavy = [child for child in layer.children() if _has_matrices(child)]
    attention = [child for child in heavy if "attention" in type(child).__name__.lower()]
    mlp = tuple(child for child in heavy if child not in attention)
    if len(attention) != 1 or not mlp:
        held = ", ".join(type(child).__name__ for child in heavy) or "nothing"
        raise InputError(
            f"{title} has {len(attention)} attention modules and {len(mlp)} feed-forward ones ({held}); one of the "
            "first and some of the second are needed: this architecture cannot be trained here"
        )
    return attention[0], mlp


def _final_norm(stack: nn.Module, list_name: str) -> nn.Module | None:
    """The decoder's own norm; of several the one after the blocks."""
    names = [name for name, _ in stack.named_children()]
    norms = [name for name, child in stack.named_children() if "norm" in type(child).__name__.lower()]
    if len(norms) > 1:
        norms = [name for name in norms if names.index(name) > names.index(list_name)]
    return getattr(stack, norms[0]) if len(norms) == 1 else None


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.out_features > 1
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", 0) > 1
