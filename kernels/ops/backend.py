"""Which implementation of an operation runs: the torch reference or its Triton twin.

Triton runs on tensors of one CUDA device if it is installed, torch everywhere else. `SURGERY_KERNELS=torch|triton`
overrules that, and is then obeyed or refused: nothing falls back. Triton's interpreter (`TRITON_INTERPRET=1`, read by
Triton when a kernel is decorated) also takes tensors on the CPU, slowly, and so only when it is asked for.
"""

import importlib.metadata
import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from surgery.errors import UsageError

Backend = Literal["torch", "triton"]

VARIABLE = "SURGERY_KERNELS"
"""Environment variable: auto, torch or triton; read at every call."""

_INTERPRET = "TRITON_INTERPRET"


def choose(*tensors: Tensor, wide: bool = False, lacking: str | None = None) -> Backend:
    """Triton for tensors of one CUDA device where it is installed, otherwise torch; `SURGERY_KERNELS` overrules.

    Args:
        tensors: What the operation reads, at least one tensor.
        wide: The Triton kernel computes float64 tensors in float64; without, they are left to torch.
        lacking: Why there is no Triton kernel for this call, where there is none.

    Raises:
        UsageError: `SURGERY_KERNELS` holds another word, or asks for Triton where it cannot run.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", *get_args(Backend)):
        raise UsageError(
            f"{VARIABLE} is {asked!r}; it must be auto, torch or triton. Set one of these or unset it."
        )
    if asked == "torch":
        return "torch"
    obstacle = lacking or _obstacle({tensor.device for tensor in tensors}, asked == "triton")
    if obstacle is None and not wide and any(tensor.dtype == torch.float64 for tensor in tensors):
        obstacle = "float64 tensors are computed by torch alone"
    if asked == "triton" and obstacle:
        raise UsageError(f"{VARIABLE}=triton, but {obstacle}. Unset it to let torch compute this.")
    return "torch" if obstacle else "triton"


def recorded(device: torch.device | str) -> dict[str, str]:
    """What decides the arithmetic on a device, for a manifest: the backend, and Triton's version where it runs."""
    if choose(torch.empty(0, device=device)) == "torch":
        return {"kernels": "torch"}
    return {"kernels": "triton", "triton": importlib.metadata.version("triton")}


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get(_INTERPRET) == "1"


def _obstacle(devices: set[torch.device], asked: bool) -> str | None:
    """Why Triton cannot compute on these devices, or None."""
    if len(devices) > 1:
        return f"the tensors are on {' and '.join(sorted(map(str, devices)))}, and one device is needed"
    [device] = devices
    if device.type != "cuda" and not (device.type == "cpu" and asked and interpreted()):
        return f"the tensors are on {device}; Triton needs CUDA (or {_INTERPRET}=1 before its import)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'model-surgery[triton]')"
    return None
