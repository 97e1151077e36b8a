"""Tiles, and the two ways of rounding one."""

import pytest
import torch

from surgery.kernels import philox, rounders, tiling

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(64, 48), (1, 131), (97, 1), (33, 65), (3, 17, 29)]


def _numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(*shape, generator=generator, dtype=FP64)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_stochastic_rounding_is_unbiased_over_seeds(dtype):
    seeds, target = 150, _numbers(23, 31)

    def z(found, step, fraction):
        # Going up with probability f has variance f (1 - f) step^2.
        return (found - target) / (step * (fraction * (1 - fraction)).sqrt() / seeds**0.5)

    draws = torch.stack(
        [rounders.Stochastic(philox.key(seed, "w"))(target, dtype, 0).double() for seed in range(seeds)]
    )
    low, high = draws.amin(0), draws.amax(0)
    fraction = (target - low) / (high - low)
    usable = (fraction > 0.1) & (fraction < 0.9)
    assert usable.float().mean() > 0.7
    assert ((draws == low) | (draws == high)).all()
    deviations = z(draws.mean(0), high - low, fraction)[usable]
    assert deviations.abs().max() < 5
    assert deviations.mean().abs() < 5 / usable.sum() ** 0.5
    nearest = z(rounders.nearest(target, dtype).double(), high - low, fraction)[usable]
    assert nearest.abs().max() > 5  # control: the same bound condemns rounding to nearest


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_stochastic_rounding_is_unbiased_among_subnormals(dtype):
    smallest = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}[dtype]
    values = torch.tensor([0.25, -0.25, 1.5, 3.25, -0.75, 0.0, 2.0], dtype=FP64).repeat(20_000, 1) * smallest
    found = rounders.Stochastic(philox.key(0, "w"))(values, dtype, 0).double() / smallest
    exact = values / smallest
    assert ((found - exact).abs() < 1).all()
    assert torch.equal(found[:, 5:], exact[:, 5:])
    # Deviation of one draw is at most 1/2; five of a mean of 20,000.
    assert ((found - exact).mean(0).abs() < 5 * 0.5 / 20_000**0.5).all()
    assert ((values.to(dtype).double() / smallest - exact).mean(0).abs() > 0.02)[:5].all()  # control: nearest


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_values_on_the_grid_are_never_moved(dtype):
    values = _numbers(50, 20).to(dtype).double()
    values[0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max])
    for rounder in (rounders.nearest, rounders.Stochastic(philox.key(0, "w"))):
        found = rounder(values, dtype, 0).double()
        assert torch.equal(found.view(torch.int64), values.view(torch.int64))
        if dtype != FP64:
            assert not torch.equal(rounder(values * 1.001, dtype, 0).double(), values * 1.001)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 70, 500, 1 << 20])
def test_tiles_cover_every_entry_once_and_are_contiguous(shape, size, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", size)
    seen = torch.zeros(shape if len(shape) == 3 else (1, *shape), dtype=torch.int64)
    for at in tiling.tiles(seen.shape):
        assert seen[at].is_contiguous()
        assert seen[at].numel() <= max(size, seen.shape[-1])
        seen[at] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounding_to_nearest_from_float64_finds_the_nearer_neighbour(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-9, 4, 4000, dtype=FP64)
    values = torch.randn(4000, generator=generator, dtype=FP64) * scale
    found = rounders.nearest(values, dtype).double()
    bits = rounders.nearest(values, dtype).view(torch.int16)
    for other in (bits + 1, bits - 1):
        neighbour = other.view(dtype).double()
        assert ((found - values).abs() <= (neighbour - values).abs())[neighbour.isfinite()].all()
