"""The truncated decomposition is the best of its rank, for every shape, scale, dtype and batch."""

import math

import pytest
import torch

from surgery.errors import InputError, UsageError
from surgery.spectral import Factors, Spectrum, automatic_rank, hard_threshold, truncated_svd

SHAPES = [(1, 1), (1, 7), (9, 1), (13, 29), (63, 100), (131, 257), (257, 131), (201, 199)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spiked(m, n, strengths, seed=0):
    """Gaussian noise of deviation 1 plus spikes at `strengths` times the edge of its spectrum."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(s, len(strengths), generator=generator))[0] for s in (m, n))
    return noise + (left * torch.tensor(strengths) * (math.sqrt(m) + math.sqrt(n))) @ right.T


def best(delta, rank):
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def distance(found, expected):
    """Frobenius distance relative to what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def dense(factors):
    return Factors(factors.left.double(), factors.values.double(), factors.right.double()).dense()


def assert_orthonormal(factors):
    eye = torch.eye(factors.rank, dtype=torch.float64)
    assert (factors.left.double().mT @ factors.left.double() - eye).abs().max() < 1e-6
    assert (factors.right.double() @ factors.right.double().mT - eye).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["certified", "exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_found_is_the_best_approximation(shape, method):
    delta = spiked(*shape, [4.0])
    for rank in {1, min(2, *shape), min(shape) // 3 + 1, min(shape)}:
        found = truncated_svd(delta, rank, seed=0, name="w", tol=1e-4, method=method)
        captured = (delta.double() - dense(found.factors)).square().sum()
        least = (delta.double() - best(delta, rank)).square().sum()
        assert captured <= least + 1e-7 * delta.double().square().sum()
        assert_orthonormal(found.factors)
        assert found.factors.left.shape == (shape[0], rank)
        assert found.factors.right.shape == (rank, shape[1])


def test_spikes_are_found_to_the_tolerance():
    delta = spiked(301, 257, [4.0, 3.0, 2.0, 1.6, 1.3, 1.2])
    assert distance(dense(truncated_svd(delta, 6, seed=0, name="w", tol=1e-4).factors), best(delta, 6)) < 1e-4


def test_no_rank_k_projection_captures_more():
    """Eckart and Young: neither random subspaces nor small turns of the one found leave less of delta."""
    delta = spiked(150, 211, [3.0, 2.0, 1.5, 1.2]).double()
    factors = truncated_svd(delta, 4, seed=0, name="w", tol=1e-6).factors
    left = (delta - factors.dense()).norm()
    for turn in [1e-3, 1e-2, 0.1, 1.0, 100.0] * 10:
        basis = torch.linalg.qr(factors.left + turn * torch.randn(150, 4, dtype=torch.float64) / 12)[0]
        assert (delta - basis @ (basis.T @ delta)).norm() > left


def test_control_a_turned_subspace_is_not_the_best():
    """The comparison above sees a turn of one part in a thousand."""
    delta = spiked(150, 211, [3.0, 2.0, 1.5, 1.2]).double()
    factors = truncated_svd(delta, 4, seed=0, name="w", tol=1e-6).factors
    turned = torch.linalg.qr(factors.left + 1e-3 * torch.randn(150, 4, dtype=torch.float64))[0]
    assert (delta - turned @ (turned.T @ delta)).norm() > (delta - factors.dense()).norm() + 1e-6


@pytest.mark.parametrize("rank", [1, 2, 5, 17])
@pytest.mark.parametrize("shape", [(131, 257), (63, 100)], ids=str)
def test_rank_is_exactly_the_one_asked_for(shape, rank):
    factors = truncated_svd(torch.randn(shape), rank, seed=0, name="w").factors
    assert factors.rank == rank
    assert torch.linalg.matrix_rank(dense(factors), rtol=1e-5) == rank


@pytest.mark.parametrize("shape", [(131, 257), (257, 131), (40, 33)], ids=str)
def test_matrix_of_lower_rank_is_reproduced_and_the_rest_is_orthonormal(shape):
    delta = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    found = truncated_svd(delta, 5, seed=0, name="w")
    assert distance(dense(found.factors), delta) < 1e-5
    assert (found.factors.values[2:] < 1e-5 * found.factors.values[0]).all()
    assert_orthonormal(found.factors)
    assert found.energy_kept[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(131, 257), (257, 131), (7, 5)], ids=str)
def test_zero_matrix_has_zero_values_and_no_error(shape):
    found = truncated_svd(torch.zeros(shape), 3, seed=0, name="w")
    assert found.factors.values.tolist() == [0.0] * 3
    assert_orthonormal(found.factors)
    assert (found.certificates[0].error, found.certificates[0].energy_deficit) == (0.0, 0.0)
    assert (found.energy, found.energy_kept) == ((0.0,), (1.0,))


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(140, 201), (201, 140), (20, 31)], ids=str)
def test_batched_equals_looped(shape, tol):
    """Each within its own bound of the truth, hence of each other; equal where both have converged."""
    parts = [spiked(*shape, [4.0 - i, 1.5], seed=i) * 10.0**-i for i in range(3)] + [torch.zeros(shape)]
    together = truncated_svd(torch.stack(parts), 2, seed=0, name="w", tol=tol)
    assert len(together.certificates) == len(together.energy) == 4
    for i, part in enumerate(parts[:3]):
        alone = truncated_svd(part, 2, seed=0, name="w", tol=tol)
        batch = Factors(
            *(t[i] for t in (together.factors.left, together.factors.values, together.factors.right))
        )
        allowed = alone.certificates[0].error + together.certificates[i].error
        assert distance(dense(batch), dense(alone.factors)) <= allowed
        assert together.energy[i] == pytest.approx(alone.energy[0], rel=1e-6)
    assert together.factors.values[3].tolist() == [0.0, 0.0]


def test_batch_of_equals_repeats_the_single_result_to_roundoff():
    delta = spiked(140, 201, [3.0, 1.5])
    alone = truncated_svd(delta, 2, seed=0, name="w")
    together = truncated_svd(torch.stack([delta] * 3), 2, seed=0, name="w")
    for i in range(3):
        assert torch.allclose(together.factors.left[i], alone.factors.left, atol=1e-5)
        assert together.certificates[i].passes == alone.certificates[0].passes


def test_only_the_stubborn_matrix_of_a_batch_is_decomposed_in_full():
    tied = torch.linalg.qr(torch.randn(200, 150))[0]
    found = truncated_svd(torch.stack([spiked(200, 150, [3.0, 2.0]), tied]), 2, seed=0, name="w")
    assert [c.criterion for c in found.certificates] == ["subspace", "exact"]
    assert found.factors.values[1].tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-18, 1e18, 1e30, 1e35], ids=str)
@pytest.mark.parametrize("shape", [(140, 201), (20, 31)], ids=str)
def test_scale_changes_nothing_but_the_values(shape, scale):
    delta = spiked(*shape, [3.0, 1.5])
    plain, scaled = (truncated_svd(delta * s, 2, seed=0, name="w") for s in (1.0, scale))
    assert torch.allclose(scaled.factors.left, plain.factors.left, atol=2e-5)
    assert (scaled.factors.values.double() / scale).tolist() == pytest.approx(
        plain.factors.values.tolist(), rel=1e-5
    )
    assert scaled.energy[0] / scale / scale == pytest.approx(plain.energy[0], rel=1e-5)
    assert scaled.energy_kept == pytest.approx(plain.energy_kept, rel=1e-5)


def test_transposition_exchanges_the_factors():
    delta = spiked(140, 201, [3.0, 1.5])
    plain, turned = (truncated_svd(d, 2, seed=0, name="w", tol=1e-5).factors for d in (delta, delta.T))
    assert distance(dense(turned).T, dense(plain)) < 1e-4


def test_strided_input_gives_the_result_of_its_copy():
    delta = spiked(281, 403, [3.0, 1.5])[::2, ::2]
    strided, copied = (
        truncated_svd(d, 2, seed=0, name="w", tol=1e-5).factors for d in (delta, delta.contiguous())
    )
    assert distance(dense(strided), dense(copied)) < 1e-5


def test_result_depends_on_seed_and_name_alone():
    delta = spiked(150, 170, [3.0, 2.0, 1.5])
    runs = {}
    for seed, name, state in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1)]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        runs[seed, name, state] = truncated_svd(delta, 3, seed=seed, name=name, tol=0.1).factors.left
        assert torch.equal(torch.get_rng_state(), before)
    first = runs[0, "a", 1]
    assert torch.equal(first, runs[0, "a", 2])
    assert not torch.equal(first, runs[1, "a", 1])
    assert not torch.equal(first, runs[0, "b", 1])


@pytest.mark.parametrize("shape", [(140, 201), (20, 31)], ids=str)
def test_largest_entry_of_each_left_vector_is_positive(shape):
    left = truncated_svd(torch.randn(shape), 5, seed=0, name="w").factors.left
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_values_fall_and_energy_is_the_squared_norm():
    delta = spiked(140, 201, [3.0, 2.0, 1.5])
    found = truncated_svd(delta, 3, seed=0, name="w")
    assert found.factors.values.tolist() == sorted(found.factors.values.tolist(), reverse=True)
    assert found.energy[0] == pytest.approx(float(delta.double().square().sum()), rel=1e-6)
    assert found.energy_kept[0] == pytest.approx(
        float(best(delta, 3).square().sum()) / found.energy[0], rel=1e-5
    )


def test_scaled_factors_are_the_factors_of_the_scaled_matrix():
    factors = truncated_svd(torch.randn(3, 12, 9), 2, seed=0, name="w").factors
    assert torch.allclose(factors.scaled(1.25).dense(), 1.25 * factors.dense(), rtol=1e-5)
    assert factors.dense().shape == (3, 12, 9)


def test_input_is_left_unchanged_and_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        delta = torch.randn(140, 201, dtype=dtype) * 1e-20
        before = delta.clone()
        factors = truncated_svd(delta, 2, seed=0, name="w").factors
        assert torch.equal(delta, before)
        assert {factors.left.dtype, factors.values.dtype, factors.right.dtype} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_refused(dtype):
    with pytest.raises(UsageError, match=r"blocks\.0: .*needed is float32 or float64"):
        truncated_svd(torch.zeros(4, 4, dtype=dtype), 1, seed=0, name="blocks.0")


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_outside_the_matrix_is_refused(rank):
    with pytest.raises(UsageError, match="not from 1 to 4"):
        truncated_svd(torch.zeros(4, 9), rank, seed=0, name="w")


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), (0, 3), (0, 3, 4)], ids=str)
def test_shapes_that_are_no_matrices_are_refused(shape):
    with pytest.raises(UsageError, match="shape"):
        truncated_svd(torch.zeros(shape) if len(shape) > 1 else torch.zeros(1, 1, 1, 4), 1, seed=0, name="w")


@pytest.mark.parametrize("tol", [0.0, -1e-3, math.nan])
def test_tolerance_must_be_positive(tol):
    with pytest.raises(UsageError, match="tolerance"):
        truncated_svd(torch.zeros(4, 4), 1, seed=0, name="w", tol=tol)


@pytest.mark.parametrize("method", ["certified", "exact"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(20, 31), (140, 201), (2, 20, 31)], ids=str)
def test_poisoned_input_is_an_error_that_names_the_tensor(shape, poison, method):
    delta = torch.randn(shape)
    delta[..., 3, 5] = poison
    with pytest.raises(InputError, match=r"blocks\.0: delta holds NaN or infinity"):
        truncated_svd(delta, 2, seed=0, name="blocks.0", method=method)


def test_values_beyond_the_dtype_are_an_error_and_not_infinity():
    with pytest.raises(InputError, match="beyond the range"):
        truncated_svd(torch.full((64, 64), 3e38), 1, seed=0, name="w")
    with pytest.raises(InputError, match="rescale the weights"):
        truncated_svd(torch.full((4, 4), 1e300, dtype=torch.float64), 1, seed=0, name="w")


def found_rank(delta, max_rank=32, method="certified") -> int:
    found = automatic_rank(delta, max_rank=max_rank, seed=0, name="w", method=method)
    assert isinstance(found, Spectrum)
    return found.factors.rank


@pytest.mark.parametrize("method", ["certified", "exact"])
@pytest.mark.parametrize("shape", [(300, 300), (211, 450), (450, 211), (90, 120)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_automatic_rank_counts_the_spikes_above_the_noise(rank, shape, method):
    """Spikes of 1.6 to 4 edges are kept; two of a fifth of an edge drown in the noise and are not."""
    strengths = [*torch.linspace(4, 1.6, rank).tolist(), 0.2, 0.2]
    assert found_rank(spiked(*shape, strengths, seed=rank), method=method) == rank


@pytest.mark.parametrize("shape", [(300, 301), (63, 200)], ids=str)
def test_automatic_rank_of_noise_is_one(shape):
    assert found_rank(torch.randn(shape)) == 1


def test_automatic_rank_stops_at_the_largest_allowed():
    delta = spiked(300, 300, [4.0, 3.5, 3.0, 2.5, 2.0])
    assert found_rank(delta, max_rank=3) == 3
    assert found_rank(torch.randn(3, 40) * torch.tensor([[1e3], [1e2], [1.0]]), max_rank=99) <= 3


def test_automatic_rank_of_an_exact_product_is_its_rank():
    assert found_rank(torch.randn(200, 3) @ torch.randn(3, 180)) == 3
    assert found_rank(torch.zeros(200, 180)) == 1


def test_control_automatic_rank_follows_the_strength_of_a_spike():
    """The same spike below and above the threshold changes the count: the noise level is what decides."""
    counts = [found_rank(spiked(300, 300, [3.0, strength])) for strength in (0.2, 1.6)]
    assert counts == [1, 2]


def test_hard_threshold_of_square_and_of_long_matrices():
    """4/sqrt(3) and sqrt(2), in units of sqrt(n)."""
    assert hard_threshold(100, 100) == pytest.approx(4 / math.sqrt(3) * 10)
    assert hard_threshold(1, 10**8) == pytest.approx(math.sqrt(2) * 10**4, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
def test_keeping_and_dropping_a_spike_at_the_threshold_cost_the_same(beta):
    """Which defines it: the loss x^2 + y^2 - 2 x y c d equals x^2 where the observed value y meets the threshold."""
    threshold = hard_threshold(round(beta * 1000), 1000) / math.sqrt(1000)
    # The spike x behind an observed y, from y^2 = (x + 1/x) (x + beta/x), and the cosines of its two vectors.
    half = threshold**2 - beta - 1
    x = math.sqrt((half + math.sqrt(half**2 - 4 * beta)) / 2)
    left, right = ((x**4 - beta) / (x**4 + w * x**2) for w in (beta, 1))
    assert threshold == pytest.approx(2 * x * math.sqrt(left * right), rel=1e-9)


def test_automatic_rank_refuses_an_empty_search():
    with pytest.raises(UsageError, match="at least 1, got 0"):
        automatic_rank(torch.zeros(8, 9), max_rank=0, seed=0, name="w")
