"""The certificate of a truncated decomposition bounds its true error, measured against a float64 decomposition."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from surgery.kernels.residual_bounds import Residuals, bounds
from surgery.spectral import Certificate, Factors, truncated_svd

# The true deficit is a difference of squared norms in float64: this much of it is the measurement's own roundoff.
MEASURED = 1e-12


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_values(m, n, values, generator):
    """A matrix with the given singular values in random directions."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = (orthonormal(side, len(values), generator) for side in (m, n))
    return ((left * values) @ right.T).float()


def uniform(low, high, count, generator):
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def spiked(m, n, rank, generator):
    """Spikes of 1.1 to 4 times the edge of a Gaussian bulk."""
    strengths = uniform(1.1, 4, rank, generator) * (math.sqrt(m) + math.sqrt(n))
    return with_values(m, n, strengths, generator) + torch.randn(m, n, generator=generator)


def half_spiked(m, n, rank, generator):
    """Fewer spikes than the rank: the rest is taken from the bulk."""
    return spiked(m, n, max(1, rank // 2), generator)


def bulk(m, n, rank, generator):
    return torch.randn(m, n, generator=generator)


def one_signed(m, n, rank, generator):
    """One value far above a bulk: what roundoff of its products does to the rest."""
    return torch.rand(m, n, generator=generator)


def outliers(m, n, rank, generator):
    noise = torch.randn(m, n, generator=generator)
    noise[5] *= 20
    noise[:, 3] *= 10
    return noise


def power_law(m, n, rank, generator):
    exponent = float(uniform(0.1, 2, 1, generator))
    return with_values(m, n, torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -exponent, generator)


def cluster(m, n, rank, generator):
    """More nearly equal values than one block has columns, the rank among them."""
    spread = 10 ** float(uniform(-6, -1.5, 1, generator))
    above = [3.0] * (rank // 2)
    near = 1 + spread * uniform(-1, 1, 40, generator)
    return with_values(
        m, n, torch.cat([torch.tensor(above), near, uniform(0, 0.5, 60, generator)]), generator
    )


def ties(m, n, rank, generator):
    """Exact ties wider than one block, with the rank at their end or inside."""
    first = rank if rank % 2 else rank + 3
    return with_values(m, n, [5.0] * first + [2.0] * 40 + [1.0] * 50, generator)


def low_rank(m, n, rank, generator):
    return with_values(m, n, uniform(0.01, 3, max(1, rank // 2), generator), generator)


def steep(m, n, rank, generator):
    return with_values(m, n, 10 ** (-0.4 * torch.arange(12.0, dtype=torch.float64)), generator)


KINDS = [spiked, half_spiked, bulk, one_signed, outliers, power_law, cluster, ties, low_rank, steep]


def violations(delta: torch.Tensor, factors: Factors, certificate: Certificate) -> list[str]:
    """What the certificate claims and the float64 decomposition contradicts."""
    exact = delta.double()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    k = factors.rank
    best = (left[:, :k] * values[:k]) @ right[:k]
    found = (factors.left.double() * factors.values.double()) @ factors.right.double()
    size = best.square().sum()
    error = float((best - found).norm() / size.sqrt())
    deficit = float(((exact - found).square().sum() - (exact - best).square().sum()) / size)
    claims = {
        "error": (error, certificate.error),
        "deficit": (deficit, certificate.energy_deficit + MEASURED),
    }
    return [f"{what} {true:.3e} > {bound:.3e}" for what, (true, bound) in claims.items() if true > bound]


def generator_for(kind, case):
    return torch.Generator().manual_seed(1000 * KINDS.index(kind) + case)


def check(kind, shape, ranks, cases, tol, scale=1.0):
    wrong = []
    for case in cases:
        rank = ranks[case % len(ranks)]
        delta = kind(*shape, rank, generator_for(kind, case)) * scale
        found = truncated_svd(delta, rank, seed=case, name="w", tol=tol)
        if scale != 1.0:
            delta = delta.double() / scale
            values = found.factors.values.double() / scale
            found = dataclasses.replace(found, factors=dataclasses.replace(found.factors, values=values))
        wrong += violations(delta, found.factors, found.certificates[0])
    assert wrong == []


@pytest.mark.parametrize("tol", [3e-2, 1e-3])
@pytest.mark.parametrize("shape", [(150, 231), (203, 140)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_true_error_stays_below_the_bound(kind, shape, tol):
    check(kind, shape, ranks=(6, 1, 3, 8), cases=range(4), tol=tol)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(301, 257), (160, 900), (400, 401)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_true_error_stays_below_the_bound_on_hundreds_more(kind, shape):
    check(kind, shape, ranks=(6, 1, 2, 4, 9, 12), cases=range(100, 108), tol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("tol", [3e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(301, 257), (160, 900), (400, 401)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_true_error_stays_below_the_bound_on_a_thousand_more(kind, shape, tol):
    check(kind, shape, ranks=(6, 1, 2, 4, 9, 12), cases=range(200, 212), tol=tol)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
@pytest.mark.parametrize("kind", [spiked, bulk, low_rank], ids=lambda kind: kind.__name__)
def test_bound_holds_at_any_scale(kind, scale):
    check(kind, (140, 203), ranks=(6,), cases=range(2), tol=1e-3, scale=scale)


def test_bound_holds_for_the_full_decomposition_of_a_small_matrix():
    for kind in KINDS:
        if kind is not cluster and kind is not ties:
            check(kind, (37, 29), ranks=(6, 1), cases=range(3), tol=1e-3)


def test_bound_of_a_float64_matrix_goes_below_what_float32_can_hold():
    delta = spiked(150, 231, 6, generator_for(spiked, 0)).double()
    found = truncated_svd(delta, 6, seed=0, name="w", tol=1e-9)
    assert found.certificates[0].error < 1e-9
    assert violations(delta, found.factors, found.certificates[0]) == []


def test_spikes_are_certified_as_a_subspace_and_a_bulk_by_its_energy():
    generator = torch.Generator().manual_seed(0)
    spikes = truncated_svd(spiked(300, 500, 6, generator), 6, seed=0, name="w").certificates[0]
    assert spikes.criterion == "subspace"
    assert spikes.error <= 1e-3
    # A gap a thousandth wide after the rank: which of two directions is in P_k hardly matters to what it captures.
    values = [2.0] * 5 + [1.0, 0.999999] + [0.5] * 100
    close = truncated_svd(with_values(300, 500, values, generator), 6, seed=0, name="w").certificates[0]
    assert close.criterion == "energy"
    assert close.energy_deficit <= 1e-6
    assert close.error > 1e-3


def test_small_matrix_is_decomposed_in_full():
    certificate = truncated_svd(torch.randn(40, 60), 3, seed=0, name="w").certificates[0]
    assert certificate.criterion == "exact"
    assert certificate.dimension == 40
    assert certificate.error < 1e-6


def test_tolerance_out_of_reach_ends_in_the_full_decomposition():
    delta = spiked(150, 231, 6, torch.Generator().manual_seed(0))
    found = truncated_svd(delta, 6, seed=0, name="w", tol=1e-12)
    assert found.certificates[0].criterion == "exact"
    assert violations(delta, found.factors, found.certificates[0]) == []


def test_smaller_tolerance_takes_more_passes_and_reaches_a_smaller_error():
    delta = spiked(300, 400, 6, torch.Generator().manual_seed(1))
    coarse, fine = (
        truncated_svd(delta, 6, seed=0, name="w", tol=tol).certificates[0] for tol in (1e-1, 1e-4)
    )
    assert coarse.passes < fine.passes
    assert coarse.error > fine.error


def test_no_gap_is_read_off_a_next_value_that_has_not_converged():
    """The second Ritz value lies far below sigma_2: its gap would prove too much."""
    exact = torch.diag(torch.tensor([1.0, 0.99, 0.1], dtype=torch.float64))
    turned = torch.tensor([[0.995, -0.07], [0.0999, 0.7], [0.0, 0.71]], dtype=torch.float64)
    image, values, rows = torch.linalg.svd(exact @ torch.linalg.qr(turned)[0], full_matrices=False)
    right = torch.linalg.qr(turned)[0] @ rows.T
    residual = exact.T @ image - right * values
    assert values[1] < 0.8
    energy = exact.square().sum().reshape(1)
    known = Residuals(
        values[None].numpy(), (residual.T @ residual)[None].numpy(), np.zeros((1, 2)), energy.numpy(), 0.0
    )
    missed = 1 - values[0] ** 2
    assert bounds(known, 1, 0.0).energy_deficit[0] >= missed
    assert residual[:, 0].square().sum() * values[0] ** 2 / (values[0] ** 2 - values[1] ** 2) < missed / 4


def subspace_iteration(delta, rank, columns=12, rounds=2):
    """The usual randomised decomposition: 12 columns, two rounds."""
    block = torch.linalg.qr(delta @ torch.randn(delta.shape[1], columns))[0]
    for _ in range(rounds):
        block = torch.linalg.qr(delta @ (delta.T @ block))[0]
    left, values, right = torch.linalg.svd(block.T @ delta, full_matrices=False)
    return Factors(block @ left[:, :rank], values[:rank], right[:rank])


def test_control_subspace_iteration_violates_the_bound():
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        delta = spiked(300, 400, 6, generator)
        certificate = truncated_svd(delta, 6, seed=0, name="w").certificates[0]
        assert len(violations(delta, subspace_iteration(delta, 6), certificate)) == 2


@pytest.mark.parametrize("field", ["error", "energy_deficit"])
def test_control_doctored_certificate_is_caught(field):
    """A bound made a hundred times smaller is below the true error: the bounds are not merely huge."""
    delta = spiked(300, 400, 6, torch.Generator().manual_seed(3))
    found = truncated_svd(delta, 6, seed=0, name="w", tol=1e-2)
    honest = found.certificates[0]
    doctored = dataclasses.replace(honest, **{field: getattr(honest, field) / 100})
    assert violations(delta, found.factors, honest) == []
    assert len(violations(delta, found.factors, doctored)) == 1


@pytest.mark.parametrize("spoil", ["values", "left", "right"])
def test_control_spoiled_factors_are_caught(spoil):
    delta = spiked(300, 400, 6, torch.Generator().manual_seed(4))
    found = truncated_svd(delta, 6, seed=0, name="w")
    wrong = getattr(found.factors, spoil) + 0.01 * getattr(found.factors, spoil).flip(
        -1 if spoil != "right" else -2
    )
    factors = dataclasses.replace(found.factors, **{spoil: wrong})
    assert violations(delta, factors, found.certificates[0]) != []
