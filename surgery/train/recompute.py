"""Blocks that keep only their costly products for the backward pass and compute the rest again.

What lies between two matrix products (norms, rotary embeddings, activations, adapters of low rank) is cheap to do
again and takes most of the memory of a frozen block; checkpointing whole blocks would do large products again too.
Products that narrow are done again as well: they are keys and values, which are small, or the last of a block, which
nothing in it needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Matrix products, with the place of their left factor among the arguments.
_FACTORS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "_grouped_mm": 0}
_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")


def _overload(name: str) -> Any:
    """The operator of that name; None where this version of torch has none."""
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


_LEFT = {_overload(name): place for name, place in _FACTORS.items()}
_WHOLE = frozenset(_overload(f"_scaled_dot_product_{name}") for name in _ATTENTION)

# Multiplications for an entry of the output below which a product is done again.
_CHEAP = 64


@contextmanager
def thrifty(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The blocks in that way inside the with-block, in which their backward pass belongs too.

    A block that is checkpointed as a whole already stays so.
    """
    with ExitStack() as stack:
        for layer in layers:
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                continue
            layer.forward = _selective(layer.forward)
            stack.callback(delattr, layer, "forward")
        yield


def _selective(forward: Callable[..., Any]) -> Callable[..., Any]:
    contexts = partial(create_selective_checkpoint_contexts, _policy)

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return checkpointed


def _policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    place = _LEFT.get(operator)
    kept = operator in _WHOLE or (place is not None and _is_costly(args[place], args[place + 1]))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_costly(left: Tensor, right: Tensor) -> bool:
    """Whether a product takes many multiplications for an entry, and does not narrow."""
    return _CHEAP <= left.shape[-1] <= right.shape[-1]
