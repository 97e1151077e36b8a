"""An edit stored in block-scaled fp8, against float64."""

import pytest
import torch

from surgery.checkpoint import fp8
from surgery.checkpoint.quantised import Scaling
from surgery.rounding_fp8 import replay, store_fp8
from surgery.spectral import Factors

BLOCK = Scaling("w_scale_inv", (128, 128))
MODES = ("nearest", "compensated", "stochastic", "auto")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape, scaling=BLOCK, seed=0):
    return fp8.quantise(draw(*shape, seed=seed) * 0.02, torch.float32, scaling)


def factors(anchor, size, k=3, seed=1):
    """Factors of an edit that is `size` times the anchor."""
    m, n = anchor.shape[-2:]
    left = torch.linalg.qr(draw(*anchor.shape[:-2], m, k, seed=seed)).Q
    right = torch.linalg.qr(draw(*anchor.shape[:-2], n, k, seed=seed + 1)).Q.mT
    values = torch.linspace(2, 1, k).expand(*anchor.shape[:-2], k).clone()
    norm = torch.linalg.vector_norm(values)
    return Factors(left, values * (size * torch.linalg.vector_norm(anchor) / norm), right)


def saved(anchor, edit, mode, **options):
    return store_fp8(anchor, edit, BLOCK, torch.float32, mode=mode, **{"seed": 3, "name": "w", **options})


def measured(stored, anchor, edit):
    """Retention, noise and spectral noise in float64."""
    meant = (
        edit.double()
        if isinstance(edit, torch.Tensor)
        else Factors(edit.left.double(), edit.values.double(), edit.right.double()).dense()
    )
    kept = stored.weight.dequantised().double() - anchor.double()
    energy = meant.square().sum()
    noise = kept - meant
    spectral = torch.linalg.matrix_norm(noise, 2) / torch.linalg.matrix_norm(meant, 2)
    return (
        float((kept * meant).sum() / energy),
        float((noise.square().sum() / energy).sqrt()),
        float(spectral.max()),
    )


@pytest.mark.parametrize("shape", [(200, 300), (2, 150, 140)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_figures_are_what_float64_measures(shape, mode):
    anchor = weights(*shape)
    plain = anchor.dequantised()
    edit = factors(plain, 5e-3)
    stored = saved(anchor, edit, mode)
    retention, noise, spectral = measured(stored, plain, edit)
    assert stored.inner / stored.edit_energy == pytest.approx(retention, abs=1e-4)
    assert (stored.noise_energy / stored.edit_energy) ** 0.5 == pytest.approx(noise, rel=1e-4)
    assert 0.85 * spectral < stored.noise_spectral < 1.0001 * spectral
    assert stored.anchor_energy == pytest.approx(float(plain.double().square().sum()), rel=1e-6)
    own = (stored.weight.dequantised() != replayed_anchor(stored, plain)).sum()
    assert stored.changed == int(own)


def replayed_anchor(stored, plain):
    """The anchor alone on the grid of what was stored."""
    one = torch.ones_like(stored.weight.codes.float()).to(torch.float8_e4m3fn)
    steps = fp8.Scaled(one, stored.weight.scales, BLOCK).dequantised()
    return fp8.Scaled(fp8.encode(plain / steps), stored.weight.scales, BLOCK).dequantised()


def test_nearest_is_the_nearest_value_of_the_grid():
    anchor = weights(200, 300)
    plain = anchor.dequantised()
    edit = factors(plain, 5e-2)
    stored = saved(anchor, edit, "nearest")
    target = plain.double() + edit.dense().double()
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[~grid.isnan()]
    for rows, columns in [(slice(0, 128), slice(128, 256)), (slice(128, 200), slice(256, 300))]:
        scale = stored.weight.scales[rows.start // 128, columns.start // 128].double()
        error = (stored.weight.codes[rows, columns].double() * scale - target[rows, columns]).abs()
        best = (grid * scale - target[rows, columns, None]).abs().min(-1).values
        assert torch.allclose(error, best, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [2e-2, 2e-3, 3e-4])
def test_compensation_keeps_what_nearest_loses(size):
    anchor = weights(384, 512)
    edit = factors(anchor.dequantised(), size)
    nearest, compensated = (saved(anchor, edit, mode) for mode in ("nearest", "compensated"))
    assert nearest.inner / nearest.edit_energy < 0.9  # control
    assert compensated.inner / compensated.edit_energy == pytest.approx(1, abs=5e-3)
    assert (nearest.mode, nearest.iterations) == ("nearest", 0)
    assert compensated.iterations > 0


def test_auto_says_what_it_used():
    anchor = weights(256, 256)
    small, large = (factors(anchor.dequantised(), size) for size in (1e-3, 20.0))
    assert saved(anchor, small, "auto").mode == "compensated"
    assert saved(anchor, large, "auto").mode == "nearest"


def test_a_dense_edit_is_compensated_by_its_gain():
    anchor = weights(256, 300)
    plain = anchor.dequantised()
    edit = draw(256, 300, seed=5).double() * 2e-5
    stored = saved(anchor, edit, "compensated")
    retention, noise, _ = measured(stored, plain, edit)
    assert retention == pytest.approx(1, abs=5e-3)
    assert (stored.noise_energy / stored.edit_energy) ** 0.5 == pytest.approx(noise, rel=1e-3)


def test_stochastic_rounding_is_unbiased_and_repeats():
    anchor = weights(256, 256)
    edit = factors(anchor.dequantised(), 3e-3)
    first, again, other = (saved(anchor, edit, "stochastic", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.weight.codes.view(torch.uint8), again.weight.codes.view(torch.uint8))
    assert not torch.equal(first.weight.codes.view(torch.uint8), other.weight.codes.view(torch.uint8))
    kept = [saved(anchor, edit, "stochastic", seed=seed) for seed in range(8)]
    assert sum(one.inner / one.edit_energy for one in kept) / 8 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_of_nothing_is_the_same_bytes(mode):
    anchor = weights(200, 300)
    codes = anchor.codes.view(torch.uint8)
    codes[3, 4], codes[5, 6] = 0x80, 0x00
    odd = fp8.Scaled(anchor.codes, anchor.scales * 1.7, BLOCK)
    stored = saved(odd, factors(anchor.dequantised(), 0.0), mode)
    assert torch.equal(stored.weight.codes.view(torch.uint8), codes)
    assert torch.equal(stored.weight.scales, odd.scales)
    assert (stored.fresh, stored.changed, stored.edit_energy) == (0, 0, 0.0)


def test_blocks_that_the_edit_leaves_alone_keep_codes_and_scales():
    anchor = weights(256, 384)
    edit = factors(anchor.dequantised(), 1e-2)
    edit.left[128:] = 0
    stored = saved(anchor, edit, "nearest")
    same = stored.weight.codes.view(torch.uint8) == anchor.codes.view(torch.uint8)
    assert same[128:].all()
    assert not same[:128].all()
    assert torch.equal(stored.weight.scales[1], anchor.scales[1])
    assert stored.fresh == 3


def test_edited_blocks_get_the_scale_of_their_largest_entry():
    anchor = weights(200, 300)
    edit = factors(anchor.dequantised(), 1e-2)
    stored = saved(anchor, edit, "nearest")
    target = anchor.dequantised() + edit.dense()
    assert float(stored.weight.scales[1, 2]) == pytest.approx(
        float(target[128:, 256:].abs().max() / 448), rel=1e-6
    )
    assert not torch.equal(stored.weight.scales, anchor.scales)
    assert stored.fresh == stored.weight.scales.numel()


def test_scales_made_by_another_rule_are_kept_and_spare_the_weight_a_second_quantisation():
    plain = draw(256, 256) * 0.02
    powers = Scaling("s", (128, 128), powers_of_two=True)
    anchor = fp8.Scaled(*parts(fp8.quantise(plain, torch.float32, powers)), BLOCK)
    edit = factors(plain, 1e-3)
    stored = saved(anchor, edit, "compensated")
    assert torch.equal(stored.weight.scales, anchor.scales)
    again = fp8.quantise(anchor.dequantised() + edit.dense(), torch.float32, BLOCK).dequantised()
    noise = torch.linalg.vector_norm(again - anchor.dequantised() - edit.dense())
    assert stored.noise_energy**0.5 < 0.2 * float(noise)  # control: fresh scales are many times as noisy


def parts(scaled):
    return scaled.codes, scaled.scales


def test_a_block_that_outgrows_its_scale_gets_a_fresh_one_whatever_its_rule():
    plain = draw(128, 128) * 0.02
    quarter = fp8.quantise(plain, torch.float32, BLOCK)
    anchor = fp8.Scaled(fp8.encode(quarter.codes.float() / 4), quarter.scales * 4, BLOCK)
    stored = saved(anchor, factors(anchor.dequantised(), 30.0), "nearest")
    assert stored.fresh == 1
    assert float(stored.weight.codes.float().abs().max()) == 448


def test_an_anchor_that_is_not_in_fp8_gets_fresh_scales():
    plain = (draw(200, 300) * 0.02).bfloat16()
    edit = factors(plain.float(), 0.3)
    stored = saved(plain, edit, "nearest")
    wanted = fp8.quantise(plain.float() + edit.dense(), torch.float32, BLOCK)
    assert torch.allclose(stored.weight.scales, wanted.scales, rtol=1e-6)
    same = stored.weight.codes.view(torch.uint8) == wanted.codes.view(torch.uint8)
    assert same.float().mean() > 0.999


def test_an_anchor_in_other_blocks_is_taken_by_its_values():
    other = weights(200, 300, scaling=Scaling("s", (64, 32)))
    edit = factors(other.dequantised(), 0.3)
    assert torch.equal(
        saved(other, edit, "nearest").weight.codes.view(torch.uint8),
        saved(other.dequantised(), edit, "nearest").weight.codes.view(torch.uint8),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wide", [False, True])
def test_codes_come_out_the_same_from_scales_and_cores(mode, wide):
    anchor = weights(2, 150, 140)
    edit = factors(anchor.dequantised(), 5e-3)
    given = anchor.dequantised().bfloat16() if wide else anchor
    stored = saved(given, edit, mode)
    found = replay(given, edit, BLOCK, stored.weight.scales, stored.cores, mode=stored.mode, seed=3, name="w")
    assert torch.equal(found.codes.view(torch.uint8), stored.weight.codes.view(torch.uint8))


def test_matrices_of_a_stack_are_compensated_one_by_one():
    anchor = weights(2, 150, 140)
    edit = factors(anchor.dequantised(), 5e-3)
    whole = saved(anchor, edit, "compensated")
    alone = saved(anchor.matrices()[0], Factors(edit.left[0], edit.values[0], edit.right[0]), "compensated")
    assert torch.equal(whole.weight.codes[0].view(torch.uint8), alone.weight.codes.view(torch.uint8))
