"""Looking at activations, adding to them, and running the same pass twice: with-blocks that leave nothing behind.

Backward passes belong inside the with-block of their forward pass: under gradient checkpointing they run it again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.errors import InputError
from surgery.train.step import Step

Hidden = Float[Tensor, "rows length hidden"]


@contextmanager
def probed(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Zeros added to the output of every module, listed in the order in which the modules ran.

    The gradient with respect to such a zero is that with respect to the output, also where nothing before it needs
    a gradient. The zeros take no memory.
    """
    probes: dict[int, Tensor] = {}

    def add_zero(module: nn.Module, _: Any, output: Any) -> Any:
        value = _value(module, output)
        if id(module) not in probes:
            zero = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
            probes[id(module)] = zero.requires_grad_()
            found.append(probes[id(module)])
        return _with_value(output, value + probes[id(module)])

    found: list[Tensor] = []
    with _hooks(modules, add_zero):
        yield found


@contextmanager
def perturbed(modules: Sequence[nn.Module], addends: Sequence[Hidden]) -> Iterator[None]:
    """The output of every module plus a constant, module by module in the order given; no gradient enters those."""
    by_module = {id(module): addend for module, addend in zip(modules, addends, strict=True)}

    def add(module: nn.Module, _: Any, output: Any) -> Any:
        return _with_value(output, _value(module, output) + by_module[id(module)])

    with _hooks(modules, add):
        yield


@contextmanager
def recorded(layers: Sequence[nn.Module], final_norm: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states as transformers counts them: what enters each block, then what the final norm puts out."""
    states: list[Tensor] = []

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        states.append(_value(module, output))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(final_norm.register_forward_hook(leave).remove)
        yield states


@contextmanager
def outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What every module puts out (the first entry of a tuple), filled in as they run; of several runs the last."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        found[module] = output[0] if isinstance(output, tuple) else output

    with _hooks(modules, keep):
        yield found


@contextmanager
def without_history(layer: nn.Module) -> Iterator[None]:
    """A block whose input needs no gradient, even where something (as PEFT does) made the embeddings need one."""

    def detach(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    handle = layer.register_forward_pre_hook(detach, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that need no gradient inside the with-block; those that did before do again after it."""
    changed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


@contextmanager
def restored(weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Weights that may be moved inside the with-block, put back from the copies given, bit by bit, after it."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield kept
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and then in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


Randomness = tuple[Tensor, list[Tensor]]


def randomness() -> Randomness:
    """The state of torch's random numbers on the CPU and on every device of the accelerator, if there is one."""
    devices = _device_module()
    return torch.get_rng_state(), devices.get_rng_state_all() if devices else []


@contextmanager
def replayed(state: Randomness) -> Iterator[None]:
    """The random numbers that followed `state`, dropout masks among them, once more; afterwards those now due."""
    due = randomness()
    _set_randomness(state)
    try:
        yield
    finally:
        _set_randomness(due)


def energy(gradients: Sequence[Tensor]) -> Float[Tensor, " tensors"]:
    """The squared norm of every tensor, as float64, summed in float32 or wider."""
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
    ]
    return torch.stack([norm.double().square() for norm in norms])


def joint_norm(gradients: Sequence[Sequence[Tensor]], step: Step) -> Float[Tensor, ""]:
    """The norm of all tensors of all micro-batches and processes of a step as one vector, in float64."""
    own = torch.stack([energy(tensors).sum() for tensors in gradients]).sum()
    return step.summed(own).sqrt()


def _device_module() -> Any:
    """The module of the accelerator in use, as `torch.cuda`; None on the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.get_device_module(device) if device is not None else None


def _set_randomness(state: Randomness) -> None:
    torch.set_rng_state(state[0])
    if devices := _device_module():
        devices.set_rng_state_all(state[1])


@contextmanager
def _hooks(modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _value(module: nn.Module, output: Any) -> Tensor:
    """The hidden states in what a module returned: the tensor, or the first entry of a tuple (never of a batch)."""
    value = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(value, Tensor) or value.dim() != 3:
        raise InputError(
            f"{type(module).__name__} returned no hidden states of (rows, length, hidden); "
            "this architecture cannot be trained by this method"
        )
    return value


def _with_value(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value
