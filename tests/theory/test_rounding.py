"""What storing an edit in a coarse dtype keeps of it, for each way of rounding."""

from itertools import pairwise

import pytest
import torch
from rounding_setup import (
    BF16,
    FP16,
    FP32,
    FP64,
    MODES,
    exact_sum,
    random_factors,
    random_pair,
    random_weight,
    same_bytes,
    store_edit,
)

from surgery import rounding
from surgery.kernels import philox, rounders, tiling
from surgery.spectral import Factors

# One row, one column, sizes that no tile divides; the last is a batch of experts.
SHAPES = [(64, 48), (1, 131), (97, 1), (33, 65), (3, 17, 29)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ratio of edit to weight: retention and noise of nearest, noise of stochastic, noise of compensated rounding
TABLE = {
    7e-3: (0.996, 0.23, 0.33, 0.23),
    2e-3: (0.83, 0.59, 0.98, 0.61),
    1e-3: (0.57, 0.77, 1.59, 0.88),
    3e-4: (0.20, 0.93, 3.21, 1.44),
    1e-4: (0.07, 0.98, 5.65, 2.05),
}


@pytest.mark.parametrize("ratio", TABLE)
def test_small_edits_are_lost_by_nearest_and_kept_by_compensated_rounding_with_less_noise_than_stochastic(
    ratio,
):
    weight, factors = random_pair(1024, 1024, ratio=ratio)
    kept, lost_noise, random_noise, own_noise = TABLE[ratio]
    nearest, compensated, stochastic = (
        store_edit(weight, factors, mode) for mode in ("nearest", "compensated", "stochastic")
    )
    assert nearest.retention == pytest.approx(kept, abs=0.015)
    assert nearest.noise == pytest.approx(lost_noise, rel=0.05)
    assert compensated.retention == pytest.approx(1.0, abs=2e-3)
    assert compensated.noise == pytest.approx(own_noise, rel=0.05)
    # <noise, E> / ||E||^2 has a standard deviation of noise / sqrt(entries) = 0.0056 at most; five of them.
    assert stochastic.retention == pytest.approx(1.0, abs=5 * random_noise / 1024)
    assert stochastic.noise == pytest.approx(random_noise, rel=0.05)
    assert compensated.noise < stochastic.noise
    assert (nearest.iterations, stochastic.iterations) == (0, 0)
    assert 1 <= compensated.iterations <= rounding.LIMIT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reported_figures_are_those_of_what_was_stored(shape, mode):
    weight, factors = random_pair(*shape, ratio=2e-3, rank=4)
    result = store_edit(weight, factors, mode)
    anchor, edit = exact_sum(weight, factors)
    stored = result.weight.double() - anchor
    assert result.weight.shape == weight.shape
    assert result.mode == mode
    assert result.edit_energy == pytest.approx(edit.square().sum().item(), rel=1e-5)
    assert result.inner == pytest.approx(
        (stored * edit).sum().item(), rel=1e-4, abs=1e-6 * result.edit_energy
    )
    assert result.noise_energy == pytest.approx((stored - edit).square().sum().item(), rel=1e-4)
    assert result.retention == pytest.approx(result.inner / result.edit_energy)
    assert result.noise == pytest.approx((result.noise_energy / result.edit_energy) ** 0.5)
    assert result.changed == (result.weight != weight).sum()
    assert result.changed > 0


@pytest.mark.parametrize("shape", [(200, 300), (300, 20), (1, 400), (2, 90, 70)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_spectral_noise_is_a_slight_underestimate(shape, mode):
    weight, factors = random_pair(*shape, ratio=1e-3, rank=3)
    anchor, edit = exact_sum(weight, factors)
    result = store_edit(weight, factors, mode)
    noise = torch.linalg.matrix_norm(result.weight.double() - anchor - edit, 2)
    exact = (noise / torch.linalg.matrix_norm(edit, 2)).max().item()
    assert 0.9 * exact <= result.noise_spectral <= exact * (1 + 1e-5)


def test_auto_takes_nearest_where_it_keeps_the_edit_and_compensates_elsewhere():
    for ratio, mode in ((2e-2, "nearest"), (1e-3, "compensated")):
        weight, factors = random_pair(256, 200, ratio=ratio)
        automatic, forced = store_edit(weight, factors, "auto"), store_edit(weight, factors, mode)
        assert automatic.mode == mode
        assert same_bytes(automatic.weight, forced.weight)
        assert automatic.retention > rounding.ENOUGH


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_compensation_fixes_the_whole_core_and_not_only_the_retention(dtype):
    # Against float16's finer grid the same loss takes an edit 8 times smaller.
    weight, factors = random_pair(600, 801, ratio=1e-3 if dtype == BF16 else 1.2e-4, rank=3, dtype=dtype)
    anchor, edit = exact_sum(weight, factors)

    def residual(mode):
        lost = edit - (store_edit(weight, factors, mode, dtype).weight.double() - anchor)
        return (factors.left.double().mT @ lost @ factors.right.double().mT).norm() / edit.norm()

    assert residual("compensated") <= rounding.CORE_TOLERANCE * 1.01
    assert residual("nearest") > 0.2


@pytest.mark.parametrize(("anchor_dtype", "dtype"), [(FP32, FP16), (FP32, BF16), (FP64, FP32)], ids=str)
def test_storing_stochastically_is_that_rounding_of_the_exact_sum(anchor_dtype, dtype):
    weight, factors = random_pair(23, 31, ratio=0.3, rank=3, dtype=anchor_dtype)
    target = sum(exact_sum(weight, factors))
    found = store_edit(weight, factors, "stochastic", dtype, seed=4, name="x").weight
    expected = rounders.Stochastic(philox.key(4, "x"))(target, dtype, 0)
    assert (found != expected).sum() <= 1  # a sum taken in another order may fall on the other side of a bit
    assert (found != rounders.Stochastic(philox.key(5, "x"))(target, dtype, 0)).sum() > 100


def test_stochastic_bits_depend_on_seed_and_name():
    weight, factors = random_pair(40, 50, ratio=1e-3)
    first = store_edit(weight, factors, "stochastic", seed=1, name="a").weight
    assert same_bytes(first, store_edit(weight, factors, "stochastic", seed=1, name="a").weight)
    assert not same_bytes(first, store_edit(weight, factors, "stochastic", seed=2, name="a").weight)
    assert not same_bytes(first, store_edit(weight, factors, "stochastic", seed=1, name="b").weight)


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_do_not_depend_on_the_size_of_a_tile(shape, mode, monkeypatch):
    weight, factors = random_pair(*shape, ratio=2e-3, rank=5)
    found = []
    for size in (1, 70, 500, 1 << 20):
        monkeypatch.setattr(tiling, "TILE", size)
        found.append(store_edit(weight, factors, mode).weight)
    assert all(same_bytes(found[0], other) for other in found[1:])


@pytest.mark.parametrize("mode", ["nearest", "compensated"])
def test_a_batch_of_experts_gives_what_each_gives_alone(mode):
    weight, factors = random_pair(5, 60, 90, ratio=1e-3)
    values = factors.values * torch.tensor([1.0, 0.1, 3.0, 0.0, 1.0])[:, None]  # one expert without an edit
    factors = Factors(factors.left, values, factors.right)
    together = store_edit(weight, factors, mode)
    alone = [
        store_edit(weight[i], Factors(factors.left[i], values[i], factors.right[i]), mode)
        for i in range(len(weight))
    ]
    assert same_bytes(together.weight, torch.stack([one.weight for one in alone]))
    assert same_bytes(together.weight[3], weight[3])
    assert together.inner == pytest.approx(sum(one.inner for one in alone))
    assert together.noise_energy == pytest.approx(sum(one.noise_energy for one in alone))
    assert together.noise_spectral == pytest.approx(max(one.noise_spectral for one in alone), rel=1e-3)
    assert together.iterations == max(one.iterations for one in alone)
    assert together.changed == sum(one.changed for one in alone)
    assert not same_bytes(together.weight[0], weight[0])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("anchor_dtype", [BF16, FP32, FP64], ids=str)
def test_wide_outputs_are_the_exact_sum_rounded_once(anchor_dtype, dtype):
    weight, factors = random_pair(75, 130, ratio=0.3, rank=7, dtype=anchor_dtype)
    exact = sum(exact_sum(weight, factors))
    result = store_edit(weight, factors, "auto", dtype)
    assert result.mode == "nearest"
    # A tie in the last place of float64 aside, half a step is all the error there is.
    half = (
        torch.nextafter(result.weight.abs(), torch.tensor(torch.inf, dtype=dtype)) - result.weight.abs()
    ) / 2
    assert ((result.weight.double() - exact).abs() <= half.double() + 1e-16).all()
    single = (weight.float() + factors.dense()).to(dtype).double()
    assert ((single - exact).abs() > half.double() + 1e-16).any()  # control: adding in float32 rounds twice


def test_a_float32_anchor_is_rounded_to_sixteen_bits_once():
    # Just beside a tie: a detour over float32 forgets on which side, and then rounds to even.
    anchor = torch.tensor([[1 + 2.0**-8], [-1 - 2.0**-8], [1 + 3 * 2.0**-8], [1 + 2.0**-11]], dtype=FP32)
    edit = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], dtype=FP64) * 2.0**-30
    found = store_edit(anchor, edit, "nearest", BF16).weight.flatten().tolist()
    assert found == [1 + 2.0**-7, -1 - 2.0**-7, 1 + 2.0**-7, 1.0]
    assert (anchor.double() + edit).to(BF16).flatten().tolist() == [1.0, -1.0, 1 + 2.0**-6, 1.0]  # control
    assert store_edit(anchor, edit, "nearest", FP16).weight[3].item() == 1 + 2.0**-10


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize(("anchor_dtype", "dtype"), [(BF16, BF16), (FP16, FP16), (FP32, BF16), (FP64, FP16)])
def test_an_edit_of_zero_changes_nothing(mode, anchor_dtype, dtype):
    weight = random_weight(2, 9, 11, dtype=anchor_dtype)
    weight[0, 0, 0] = -0.0
    for edit in (random_factors(2, 9, 11, rank=3, size=0.0), torch.zeros(2, 9, 11)):
        result = store_edit(weight, edit, mode, dtype)
        assert same_bytes(result.weight, rounders.nearest(weight, dtype))
        assert (result.retention, result.noise, result.noise_spectral, result.changed) == (1.0, 0.0, 0.0, 0)
        assert result.mode == "nearest"
    assert store_edit(weight, random_factors(2, 9, 11, rank=3, size=0.1), mode, dtype).changed > 0


def test_an_expert_without_an_edit_is_only_cast_while_the_others_are_compensated(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 60 * 90)  # no expert is written along with another
    weight = torch.cat((random_weight(1, 60, 90, dtype=FP32), random_weight(2, 60, 90).float()))
    factors = random_factors(3, 60, 90, rank=4, size=1e-3 * weight[1].norm().item())
    edit = Factors(factors.left, factors.values * torch.tensor([0.0, 1.0, 1.0])[:, None], factors.right)
    result = store_edit(weight, edit, "auto")
    assert result.mode == "compensated"
    assert same_bytes(result.weight[0], weight[0].bfloat16())
    assert not same_bytes(result.weight[1:], weight[1:].bfloat16())


@pytest.mark.parametrize("ratio", [2e-3, 5e-4])
def test_more_iterations_never_store_a_worse_core(ratio, monkeypatch):
    # Small matrices answer in jumps, so that an iteration often overshoots.
    weight, factors = random_pair(24, 20, ratio=ratio, rank=4)
    anchor, edit = exact_sum(weight, factors)
    errors = []
    for limit in range(12):
        monkeypatch.setattr(rounding, "LIMIT", limit)
        result = store_edit(weight, factors, "compensated")
        lost = edit - (result.weight.double() - anchor)
        beside = (
            factors.left.double().mT @ lost @ factors.right.double().mT
        ).norm().item() / edit.norm().item()
        errors.append(max(beside / rounding.CORE_TOLERANCE, abs(1 - result.retention) / rounding.TOLERANCE))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


def test_factors_padded_with_zeros_are_compensated_like_the_bare_ones():
    weight, factors = random_pair(120, 140, ratio=1e-3, rank=5)
    values = factors.values.clone()
    values[2:] = 0
    left = factors.left.clone()
    left[:, 4] = 0
    padded = store_edit(weight, Factors(left, values, factors.right), "compensated")
    bare = store_edit(weight, Factors(factors.left[:, :2], values[:2], factors.right[:2]), "compensated")
    for result in (padded, bare):
        assert result.retention == pytest.approx(1.0, abs=2e-3)
    assert padded.noise == pytest.approx(bare.noise, rel=0.05)
