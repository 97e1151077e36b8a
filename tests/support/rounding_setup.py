"""Weights and edits for tests of rounding."""

import torch

from surgery.rounding import store
from surgery.spectral import Factors

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


MODES = ["nearest", "compensated", "stochastic"]


def random_weight(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(*shape, generator=generator, dtype=FP64)).to(dtype)


def random_factors(*shape, rank, size, seed=1, dtype=FP32):
    """Orthonormal factors with slowly falling values whose root sum of squares is `size`."""
    *batch, m, n = shape
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(*batch, m, rank, generator=generator, dtype=FP64)).Q
    right = torch.linalg.qr(torch.randn(*batch, n, rank, generator=generator, dtype=FP64)).Q.mT
    values = torch.linspace(1.5, 0.7, rank, dtype=FP64).expand(*batch, rank)
    values = size * values / values[..., :1, None].shape[-1] / values.norm(dim=-1, keepdim=True)
    return Factors(left.to(dtype), values.to(dtype), right.to(dtype).contiguous())


def random_pair(*shape, ratio, rank=6, dtype=BF16, seed=0):
    """A weight and an edit whose norms are as 1 to `ratio`."""
    weight = random_weight(*shape, dtype=dtype, seed=seed)
    size = ratio * weight.double().norm() / max(1, shape[0] if len(shape) == 3 else 1) ** 0.5
    return weight, random_factors(*shape, rank=rank, size=size.item(), seed=seed + 1)


def exact_sum(anchor, factors):
    """Anchor and edit in float64; their sum has no rounding to speak of."""
    edit = (factors.left.double() * factors.values.double()[..., None, :]) @ factors.right.double()
    return anchor.double(), edit


def store_edit(anchor, edit, mode, dtype=BF16, seed=0, name="w"):
    return store(anchor, edit, dtype, mode=mode, seed=seed, name=name)


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))
