"""How much memory a run takes, from headers: what one tensor's edit needs, and how many may be in work at once."""

import math
import re
from collections.abc import Mapping

from surgery import workers
from surgery.checkpoint.layout import Checkpoint
from surgery.errors import ResourceError, UsageError
from surgery.plan import Step, output_size
from surgery.spectral import is_stored

INTERPRETER = 450 << 20
"""Resident bytes of a process that has loaded torch and holds no tensor."""

BESIDE = 256 << 20
"""Bytes that may be in work beside the tensor that needs most."""

# Vectors of float32 kept for each row and each column of a matrix by the truncated SVD (its bases and its products),
# and the float64 vectors of the result.
_BASIS_BYTES = 2 * 4 * 96 + 2 * 8 * 16
# Buffers of one worker while it stores an edit, and of the threads that hash and write.
_BUFFERS = 32 << 20

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str) -> int:
    """The number of bytes that `2GiB`, `1500 MB` or `1e9` means, at least 1.

    Raises:
        UsageError: It means none.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMG]I?)?B?\s*", text, re.IGNORECASE)
    try:
        value = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    except ValueError:
        value = 0
    if value < 1:
        raise UsageError(f"{text!r} is no number of bytes; write it as 2GiB, 1500MB or 2000000000")
    return value


def need(step: Step, aligned: Checkpoint, base: Checkpoint) -> int:
    """Bytes that editing a tensor takes at most: both weights, their difference, the result and the workspace."""
    # A scale is found by editing its weight; fp8 weights are taken to float32 first.
    step = step.weight or step
    scaled = (step.scaling is not None) + (step.base_scaling is not None)
    weights = aligned.tensors[step.name].nbytes + (base.tensors[step.base].nbytes if step.base else 0)
    return tensor_need(step.shape, weights + output_size(step), scaled) + step.workspace


def tensor_need(shape: tuple[int, ...], stored: int, scaled: int = 0) -> int:
    """Bytes that editing a tensor of this shape takes at most.

    Args:
        shape: (m, n), or (experts, m, n).
        stored: Bytes of both weights and of the result as stored.
        scaled: How many of the two weights are taken to float32 as a whole (block-scaled fp8).
    """
    basis = math.prod(shape[:-2]) * sum(shape[-2:]) * _BASIS_BYTES
    wide = (1 if is_stored(shape) else 0) + scaled
    return stored + 4 * math.prod(shape) * wide + basis + _BUFFERS


def largest_need(steps: Mapping[str, Step], aligned: Checkpoint, base: Checkpoint) -> tuple[int, str]:
    """The most that a single tensor takes, in bytes, and its name."""
    return max((need(step, aligned, base), step.name) for step in steps.values() if step.action == "edit")


def in_work(steps: Mapping[str, Step], aligned: Checkpoint, base: Checkpoint, limit: str | None) -> int:
    """Bytes that the tensors in work at once may take: what the largest needs and some beside it.

    Args:
        steps: The plan's.
        aligned: The checkpoint edited.
        base: The other one.
        limit: What `--memory-limit` says of the whole process.

    Raises:
        ResourceError: A single tensor needs more than the limit leaves.
    """
    largest, name = largest_need(steps, aligned, base)
    if limit is None:
        return largest + BESIDE
    if (room := parse_bytes(limit) - INTERPRETER) < largest:
        raise ResourceError(
            f"--memory-limit is {limit}, and editing {name} alone takes a process of about "
            f"{(INTERPRETER + largest) / 2**20:,.0f} MiB; raise the limit, or leave that tensor out with --exclude"
        )
    return room


def estimate(steps: Mapping[str, Step], aligned: Checkpoint, base: Checkpoint, limit: str | None) -> int:
    """Bytes resident at most in a run: those of an interpreter with torch, and of all tensors in work."""
    every = [need(step, aligned, base) for step in steps.values() if step.action == "edit"]
    together = sum(sorted(every)[-3 * workers.count() :])
    return INTERPRETER + min(in_work(steps, aligned, base, limit), together)
