"""Values cut over processes as FSDP cut the weights they belong to."""

from typing import Any

from torch import Tensor


def placed_like(values: Tensor, weight: Tensor) -> Tensor:
    """The values on the weight's device, and cut as it is where it is a distributed tensor."""
    values = values.to(weight.device)
    if getattr(weight, "device_mesh", None) is None:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, weight.device_mesh, weight.placements)  # type: ignore[attr-defined]


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, without its history."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()
