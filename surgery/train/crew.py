"""The processes that train together and the device each works on, as accelerate finds them.

A step's loss is a sum over all tokens of all processes, divided once, so gradients of processes are added, not
averaged. Where a launcher's configuration asks for FSDP (version 2) the model is cut with torch's `fully_shard`,
block by block; otherwise each process holds it whole and the gradients are added after the backward pass.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.train import blocks


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Crew:
    """The processes of a training run as one of them sees them; by default one alone on the CPU.

    Attributes:
        device: Where this process computes.
        rank: This process, from 0.
        world: How many there are.
        sharded: Whether the model is cut over them.
        summed: The sum of a tensor over all of them.
        backward: Adds the gradient of a scalar.
        accelerator: accelerate's, where it was started; for its trackers.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    sharded: bool = False
    summed: Callable[[Tensor], Tensor] = field(default=_alone)
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    accelerator: Any = None

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this process's device, or its share of it; the same object."""
        if not self.sharded:
            return model.to(self.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in blocks.find(model).layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The sum over processes, not the mean; by an operation that gloo has too.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum over all processes; one that no process has stays None."""
        if self.world == 1 or self.sharded:
            return
        weights = [weight for weight in weights if weight.requires_grad]
        has = torch.tensor([weight.grad is not None for weight in weights], device=self.device).int()
        there = [weight for weight, count in zip(weights, self.summed(has).tolist(), strict=True) if count]
        if not there:
            return
        flat = torch.cat([_gradient(weight).flatten() for weight in there])
        parts = self.summed(flat).split([weight.numel() for weight in there])
        for weight, part in zip(there, parts, strict=True):
            weight.grad = part.view_as(weight).to(weight.dtype)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def assemble(device: str, *, track: str | None = None, logs: Path | None = None) -> Crew:
    """The processes that a launcher started, or this one; all of them call it at the same place.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        track: A tracker of accelerate, None for none.
        logs: The folder for a tracker's files.

    Raises:
        UsageError: The tracker is not installed, accelerate was started for another device, or FSDP is version 1.
    """
    from accelerate import Accelerator

    _require_tracker(track)
    _require_device(device)
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    if device.startswith("cuda:") and torch.cuda.is_available():
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(cpu=on_cpu, log_with=track, project_dir=logs)
    except (ValueError, NotImplementedError) as error:
        what = str(error).partition("\n")[0]
        raise UsageError(f"accelerate cannot be started for --device {device} ({what})") from None
    sharded = (
        os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1
    )
    if sharded and os.environ.get("FSDP_VERSION", "2") != "2":
        raise UsageError("the launcher asks for FSDP 1; set fsdp_version: 2 in its configuration")
    return Crew(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        sharded,
        lambda tensor: accelerator.reduce(tensor, reduction="sum"),
        accelerator.backward,
        accelerator,
    )


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"device {device!r} cannot be used here; try --device cpu") from None


def _require_tracker(track: str | None) -> None:
    from accelerate.tracking import get_available_trackers

    known = sorted(str(getattr(one, "value", one)) for one in get_available_trackers())
    if track is not None and track not in known:
        raise UsageError(
            f"track is {track!r}, and the trackers installed are {', '.join(known) or 'none'}; name one of them"
        )
