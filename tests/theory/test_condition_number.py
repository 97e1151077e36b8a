"""Condition number immunisation where its theory holds: regularisers, the preconditioned step, the paper's table."""

import math

import pytest
import torch

from surgery import conditioning
from surgery.conditioning import linear, measures, problems, regularisers
from surgery.conditioning.linear import Conditioning, gram, hessian, kappa, preconditioned, singular_values
from surgery.conditioning.regularisers import condition_number, r_ill, r_well, regulariser, slopes
from surgery.errors import InputError, UsageError

SEEDS = range(6)
KINDS = ("well", "ill", "neg_well")


def values_of(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(size, seed, *, others=0.0):
    """Distinct singular values, descending, of about a decade; `others` zeros them from there on."""
    found = (
        torch.rand(size, generator=generator(seed), dtype=torch.float64).add(0.1).sort(descending=True).values
    )
    return found * torch.linspace(2, 1, size, dtype=torch.float64) * (found > others)


def problem(size, seed, spread=30.0):
    """K and a theta, both far from any symmetry."""
    source = generator(seed)
    eigenvalues = torch.logspace(0, 1, size, base=1 / spread, dtype=torch.float64)
    matrix = gram(problems.inputs(3 * size, eigenvalues, problems.rotation(size, source), source))
    theta = torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(
        size, size, generator=source, dtype=torch.float64
    )
    return matrix, theta


def bound(kind, values):
    """The theorem's step: half of it annihilates the smallest (R_ill) or the largest (R_well) singular value."""
    return 1 / abs(float(slopes(kind, values)[-1 if kind == "ill" else 0]))


def apart(one, other):
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


# The regularisers.


@pytest.mark.parametrize("seed", SEEDS)
def test_their_signs_and_scales(seed):
    values = drawn(7, seed)
    assert r_well(values) > 0
    assert r_ill(values) > 0
    for scale in (1e-3, 0.5, 40.0):
        assert float(r_well(scale * values)) == pytest.approx(scale**2 * float(r_well(values)), rel=1e-12)
        assert float(r_ill(scale * values)) == pytest.approx(float(r_ill(values)) / scale**2, rel=1e-12)


def test_r_well_is_zero_where_all_are_equal_and_nowhere_else():
    assert float(r_well(torch.full((5,), 3.0, dtype=torch.float64))) == pytest.approx(0, abs=1e-15)
    assert float(r_well(values_of(3, 3, 3, 3, 2.999))) > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_of_the_theorem_on_kappa(seed):
    values = drawn(9, seed)
    assert 1 / math.log(condition_number(values)) <= float(values[0].square() * r_ill(values))


def test_r_ill_falls_to_zero_as_kappa_grows():
    found = [float(r_ill(values_of(scale, 1.0, 0.5))) for scale in (2.0, 20.0, 2000.0)]
    assert found[0] > 50 * found[1] > 50 * 50 * found[2] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_derivatives_are_the_closed_form_and_finite_differences(kind, seed):
    left, right = (problems.rotation(6, generator(100 * seed + part)) for part in (1, 2))
    values = drawn(6, seed)
    matrix = (left * values @ right.T).requires_grad_()
    [gradient] = torch.autograd.grad(regulariser(kind, torch.linalg.svdvals(matrix)), matrix)
    assert apart(gradient, left * slopes(kind, values) @ right.T) < 1e-9
    way = torch.randn(6, 6, generator=generator(seed), dtype=torch.float64)
    size = 1e-6
    sides = [
        float(regulariser(kind, torch.linalg.svdvals(matrix.detach() + sign * size * way)))
        for sign in (1, -1)
    ]
    assert float((gradient * way).sum()) == pytest.approx(
        (sides[0] - sides[1]) / (2 * size), rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_zeros_are_left_out_of_r_ill_and_of_kappa(seed):
    values = drawn(8, seed)
    longer = torch.cat([values, torch.zeros(5, dtype=torch.float64)])
    noisy = torch.cat([values, torch.full((5,), 1e-16, dtype=torch.float64)])
    for found in (longer, noisy):
        assert regularisers.rank_of(found) == 8
        assert condition_number(found) == pytest.approx(condition_number(values), rel=1e-12)
        assert float(r_ill(found)) == pytest.approx(float(r_ill(values)), rel=1e-12)
        assert slopes("ill", found)[8:].abs().max() == 0
    # Control: what counts as zero decides it.
    assert float(r_ill(longer)) != pytest.approx(float(r_ill(values.mean() * (longer > -1))), rel=0.01)
    assert condition_number(noisy, tolerance=0.0) > 1e15


@pytest.mark.parametrize("size", [2, 9])
def test_at_a_perfect_condition_r_ill_is_held_finite_and_keeps_its_direction(size):
    values = torch.full((size,), 2.0, dtype=torch.float64, requires_grad=True)
    value = r_ill(values)
    [gradient] = torch.autograd.grad(value, values)
    assert float(value.detach()) == pytest.approx(2 / (regularisers.FLOOR * 4), rel=1e-9)
    assert apart(gradient, slopes("ill", values.detach())) < 1e-12
    assert gradient[-1] > 0 > gradient[0]
    assert not bool(r_ill(values.detach(), floor=0.0).isfinite())


def test_the_tutorials_r_ill_widens_kappa_by_letting_the_norm_diverge():
    ends = {}
    for kind in ("neg_well", "ill"):
        values = values_of(4, 3, 2, 1)
        for _ in range(100):
            values = values - 0.1 * slopes(kind, values)
        ends[kind] = values.tolist()
    assert ends["neg_well"] == pytest.approx([5532, 0.24, 0.16, 0.08], rel=0.03)
    assert ends["ill"] == pytest.approx([4.67, 3.5, 2.33, 0.63], rel=0.01)
    assert ends["ill"][0] / ends["ill"][3] == pytest.approx(7.4, rel=0.01)


# The preconditioned step.


def regularised_step(kind, theta, matrix, factor, eta):
    """theta after one step on a regulariser alone, by the gradient as autograd gives it."""
    leaf = theta.clone().requires_grad_()
    values = singular_values(hessian(preconditioned(leaf, factor), matrix))
    [gradient] = torch.autograd.grad(regulariser(kind, values), leaf)
    return theta - eta * gradient


@pytest.mark.parametrize("kind", ["well", "ill"])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_changes_eigenvalues_by_the_closed_form_and_no_eigenvector(kind, share, seed):
    matrix, theta = problem(8, seed)
    before = hessian(theta, matrix)
    values, vectors = torch.linalg.eigh(before)
    values, vectors = values.flip(0), vectors.flip(1)
    eta = share * bound(kind, values)
    after = hessian(regularised_step(kind, theta, matrix, linear.factor_of(matrix), eta), matrix)
    wanted = values * (1 - 2 * eta * slopes(kind, values)).square()
    assert apart(vectors.T @ after @ vectors, torch.diag(wanted)) < 1e-12
    assert apart(after @ before, before @ after) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_on_the_wrong_side_the_eigenvectors_are_lost(seed):
    matrix, theta = problem(8, seed)
    before = hessian(theta, matrix)
    values = singular_values(before)
    leaf = theta.clone().requires_grad_()
    [gradient] = torch.autograd.grad(r_ill(singular_values(hessian(leaf, matrix))), leaf)
    eta = 0.25 * bound("ill", values)
    wrong = hessian(theta - eta * torch.linalg.solve(matrix, gradient.T).T, matrix)
    right = hessian(theta - eta * torch.linalg.solve(matrix, gradient), matrix)
    assert apart(right @ before, before @ right) < 1e-10
    assert apart(wrong @ before, before @ wrong) > 1e-3


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.45, 0.55, 0.9, 0.99])
@pytest.mark.parametrize("seed", SEEDS)
def test_r_ill_makes_kappa_grow_at_every_step_below_the_bound(share, seed):
    matrix, theta = problem(8, seed)
    eta = share * bound("ill", singular_values(hessian(theta, matrix)))
    after = regularised_step("ill", theta, matrix, linear.factor_of(matrix), eta)
    assert kappa(after, matrix) > kappa(theta, matrix)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
@pytest.mark.parametrize("seed", SEEDS)
def test_r_well_makes_kappa_fall_up_to_a_quarter_of_the_bound(share, seed):
    matrix, theta = problem(8, seed)
    eta = share * bound("well", singular_values(hessian(theta, matrix)))
    after = regularised_step("well", theta, matrix, linear.factor_of(matrix), eta)
    assert kappa(after, matrix) < kappa(theta, matrix)


def test_the_printed_bound_of_r_well_is_not_safe():
    values = torch.cat([values_of(10), torch.linspace(1.02, 1, 9, dtype=torch.float64)])

    def after(share):
        eta = share * bound("well", values)
        return values * (1 - 2 * eta * slopes("well", values)).square()

    assert condition_number(after(0.25).sort(descending=True).values) < 4
    assert condition_number(after(0.45).sort(descending=True).values) > 10
    assert after(0.5)[0] < 1e-20


def test_the_dummy_layer_is_the_identity_and_multiplies_gradients_by_the_inverse():
    matrix, theta = problem(5, 0)
    factor = linear.factor_of(matrix)
    assert torch.equal(preconditioned(theta, factor), theta)
    source = generator(3)
    rows, outer = (torch.randn(7, 5, generator=source, dtype=torch.float64) for _ in range(2))
    weight = theta.T.clone().requires_grad_()

    def loss(used):
        return ((rows @ used.T).tanh() * outer).sum()

    [plain] = torch.autograd.grad(loss(weight), weight)
    [through] = torch.autograd.grad(loss(preconditioned(weight.T, factor).T), weight)
    assert apart(through, plain @ torch.linalg.inv(matrix)) < 1e-12
    assert apart(through, torch.linalg.inv(matrix) @ plain) > 0.1
    identity = torch.linalg.cholesky(torch.eye(5, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda used: preconditioned(used, identity), theta.clone().requires_grad_()
    )


# The algorithm.


@pytest.fixture(scope="module", params=[0, 1])
def rotated(request):
    """Tasks with rotated eigenbases, 32 inputs; K of both; the extractor of Algorithm 1."""
    tasks = conditioning.tasks(size=32, rows=200, seed=request.param)
    return tasks, gram(tasks.primary), gram(tasks.harmful), conditioning.immunise(tasks)


def test_rotated_eigenbases_can_be_told_apart(rotated):
    _, primary, harmful, found = rotated
    ratios = conditioning.ratios(found.extractor, primary, harmful)
    assert ratios.harmful > 10
    assert ratios.primary < 0.2
    assert ratios.relative > 100
    assert found.losses[-1] < 0.4 * found.losses[0]
    assert len(found.harmful) == len(found.losses) == 301
    assert found.harmful[-1] / found.harmful[0] == pytest.approx(ratios.harmful, rel=1e-9)


def test_r_ill_alone_makes_both_tasks_worse(rotated):
    tasks, primary, harmful, both = rotated
    alone = conditioning.immunise(tasks, Conditioning(lam_well=0.0))
    ratios = conditioning.ratios(alone.extractor, primary, harmful)
    assert ratios.harmful > 10
    assert ratios.primary > 1
    assert ratios.relative < conditioning.ratios(both.extractor, primary, harmful).relative / 5
    nothing = conditioning.immunise(tasks, Conditioning(lam_well=0.0, lam_ill=0.0, steps=50))
    assert conditioning.ratios(nothing.extractor, primary, harmful).harmful < 3


def test_equal_eigenbases_cannot():
    tasks = conditioning.tasks(size=32, rows=200, rotated=False)
    found = conditioning.immunise(tasks)
    ratios = conditioning.ratios(found.extractor, gram(tasks.primary), gram(tasks.harmful))
    assert ratios.relative == pytest.approx(1, rel=1e-6)
    assert ratios.harmful != pytest.approx(1, rel=0.05)


def test_nothing_done_has_ratios_of_one(rotated):
    _, primary, harmful, _ = rotated
    ratios = conditioning.ratios(torch.eye(32, dtype=torch.float64), primary, harmful)
    assert (ratios.harmful, ratios.primary, ratios.relative) == (1, 1, 1)


def test_gradient_descent_takes_longer_on_the_harmful_task_alone(rotated):
    tasks, _, _, found = rotated
    noise = torch.randn(200, generator=generator(5), dtype=torch.float64)

    def steps(rows, theta):
        features = rows @ theta
        # Targets that every direction of the features has a part in, equally large.
        basis = torch.linalg.svd(features, full_matrices=False)[0]
        return conditioning.probing_steps(features, basis @ (basis.T @ noise).sign())

    plain = torch.eye(32, dtype=torch.float64)
    assert steps(tasks.harmful, found.extractor) > 5 * steps(tasks.harmful, plain)
    assert steps(tasks.primary, found.extractor) < steps(tasks.primary, plain)


@pytest.mark.parametrize("spread", [10.0, 100.0, 1000.0])
def test_steps_of_line_search_are_of_the_order_of_kappa(spread):
    values = torch.logspace(0, 1, 12, base=spread**-0.5, dtype=torch.float64)
    features = torch.diag(values)
    found = conditioning.probing_steps(features, torch.ones(12, dtype=torch.float64))
    assert 0.1 * spread < found < 10 * spread
    assert conditioning.probing_steps(1e6 * features, torch.ones(12, dtype=torch.float64)) == found
    assert conditioning.probing_steps(features, torch.ones(12, dtype=torch.float64), most=3) == 3


def test_line_search_is_that_of_gradient_descent_on_the_probe():
    source = generator(0)
    features = torch.randn(20, 6, generator=source, dtype=torch.float64)
    targets = torch.randn(20, generator=source, dtype=torch.float64)
    least = float((features @ torch.linalg.pinv(features) @ targets - targets).square().sum())
    probe, taken = torch.zeros(6, dtype=torch.float64), 0
    first = float(targets.square().sum()) - least
    while float((features @ probe - targets).square().sum()) - least > 1e-3 * first:
        gradient = features.T @ (features @ probe - targets)
        probe = probe - gradient * (gradient @ gradient) / (features @ gradient).square().sum()
        taken += 1
    assert measures.probing_steps(features, targets) == taken


def test_white_features_do_not_blow_it_up():
    """kappa is 1 at the start, where R_ill is infinite."""
    source = generator(0)
    rows = problems.inputs(60, torch.ones(8, dtype=torch.float64), problems.rotation(8, source), source)
    tasks = conditioning.Tasks(rows, rows[:, 0], rows.flip(0))
    found = conditioning.immunise(tasks, Conditioning(lam_well=0.0, steps=5))
    assert found.harmful[0] == pytest.approx(1, abs=1e-9)
    assert all(later > earlier for earlier, later in zip(found.harmful, found.harmful[1:], strict=False))
    # Control: without the cap the first step would be longer by a factor of thousands.
    assert 1000 * bound("ill", singular_values(gram(rows))) < 5e-2


def test_no_term_moves_by_more_than_its_cap():
    """lr is so small that the primary loss does nothing, and the weights so large that only the cap holds."""
    tasks = conditioning.tasks(size=16, rows=100)
    ill = conditioning.immunise(tasks, Conditioning(lam_well=0.0, lam_ill=1e30, steps=3, lr=1e-12, cap=0.25))
    well = conditioning.immunise(tasks, Conditioning(lam_well=1e30, lam_ill=0.0, steps=1, lr=1e-12, cap=0.25))
    for before, after in zip(ill.harmful, ill.harmful[1:], strict=False):
        # The largest eigenvalue grows by (1 + 2 cap)^2 = 9/4, the smallest hardly moves.
        assert after / before == pytest.approx(9 / 4, rel=0.01)
    # The largest falls to 1/4, below the next, which hardly moves.
    second = singular_values(gram(tasks.primary))[1]
    assert well.primary[1] == pytest.approx(float(second) * 1e4, rel=0.1)


def test_what_cannot_be_done_is_said():
    tasks = conditioning.tasks(size=8, rows=50)
    few = conditioning.Tasks(tasks.primary[:5], tasks.targets[:5], tasks.harmful)
    with pytest.raises(InputError, match="singular"):
        conditioning.immunise(few)
    assert math.isfinite(conditioning.immunise(few, Conditioning(ridge=1e-3, steps=3)).losses[-1])
    with pytest.raises(UsageError, match="lower lr"):
        conditioning.immunise(tasks, Conditioning(lr=1e6))
    with pytest.raises(UsageError, match="cap is"):
        Conditioning(cap=0.5)
    with pytest.raises(UsageError, match="lam_ill is nan"):
        Conditioning(lam_ill=math.nan)
    with pytest.raises(UsageError, match="close is"):
        conditioning.probing_steps(tasks.primary, tasks.targets, close=1.0)
