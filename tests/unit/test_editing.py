"""Parts of editing one tensor that cost little and decide much."""

import math

import pytest
import torch

from surgery import editing
from surgery.errors import InputError
from surgery.kernels import philox

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
BAD = [math.nan, -math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (300, 301), (0, 4)], ids=str)
def test_finite_tensors_pass(dtype, shape):
    editing.require_finite(torch.ones(shape).to(dtype), "w", "aligned")
    if dtype != torch.float8_e4m3fn:
        editing.require_finite(torch.full(shape, torch.finfo(dtype).max, dtype=dtype), "w", "aligned")


@pytest.mark.parametrize(
    ("dtype", "bad"),
    # fp8 has no infinity.
    [(dtype, bad) for dtype in DTYPES for bad in BAD if dtype.itemsize > 1 or math.isnan(bad)],
    ids=str,
)
@pytest.mark.parametrize("at", [0, 12345, -1])
def test_one_bad_entry_anywhere_is_found(dtype, bad, at):
    tensor = torch.ones(200, 301).to(dtype)
    tensor.view(-1)[at] = bad
    with pytest.raises(InputError, match="w in the base checkpoint holds NaN or infinity"):
        editing.require_finite(tensor, "w", "base")


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equal_means_every_entry(other):
    one = torch.randn(400, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    same = one.to(other)
    assert editing._equal(one, same)
    for at in (0, 70_000, -1):
        changed = same.clone()
        changed.view(-1)[at] += 1
        assert not editing._equal(one, changed)
    zeros = torch.zeros(3, 4, dtype=other)
    assert editing._equal(zeros, -zeros)


def test_random_bits_go_on_beyond_two_to_the_32():
    """An entry's bits are those of its flat index; with 32 bits of index they would begin again."""
    words = philox.key(3, "w")
    far = philox.uniform(2**32 + 5, 64, words)
    assert torch.equal(far, philox.uniform(2**32, 69, words)[5:])
    assert not torch.equal(far, philox.uniform(5, 64, words))
    assert not torch.equal(philox.uniform(2**31 + 5, 64, words), philox.uniform(5, 64, words))
