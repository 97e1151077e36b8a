"""The loss of logits after their best recalibration: what it is invariant to, its bounds, its derivative."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from surgery.errors import OutputError
from surgery.train.calibration import calibrated_loss, calibration

# By how much the right one of two logits is the higher: chosen so that cross-entropy is .0749, with the labels
# exchanged 3.286, and .02312 at twice the margin, which is the most that a W in the box can give.
MARGINS = torch.tensor([0.8941, 2.9355, 2.9355, 3.9281, 3.9281, 3.9281, 3.9281], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 1])
LOGITS = MARGINS[:, None] / 2 * (2 * torch.nn.functional.one_hot(LABELS, 2) - 1)


def cloud(rows, classes, *, seed=0, scale=1.0, known=0.0):
    """Normal logits in float64, those of the right class raised by `known`, and the classes."""
    source = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=source, dtype=torch.float64)
    targets = torch.randint(classes, (rows,), generator=source)
    logits[torch.arange(rows), targets] += known
    return logits, targets


def test_the_reference_example():
    exchanged = LOGITS.flip(1)
    assert float(cross_entropy(LOGITS, LABELS)) == pytest.approx(0.0749, abs=5e-5)
    assert float(cross_entropy(exchanged, LABELS)) == pytest.approx(3.286, abs=5e-4)
    assert float(calibrated_loss(LOGITS, LABELS)) == pytest.approx(0.02312, abs=5e-6)
    assert float(calibrated_loss(exchanged, LABELS)) == pytest.approx(0.02312, abs=5e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_permutations_and_sign_flips_change_nothing_and_cross_entropy_they_do(classes):
    logits, targets = cloud(41, classes, known=2.0)
    order = torch.arange(classes).roll(1)
    signs = torch.ones(classes, dtype=torch.float64)
    signs[0] = -1
    loss = float(calibrated_loss(logits, targets))
    for changed in (logits[:, order], logits * signs, logits[:, order] * signs):
        assert float(calibrated_loss(changed, targets)) == pytest.approx(loss, abs=3e-9)
        assert abs(float(cross_entropy(changed, targets) - cross_entropy(logits, targets))) > 0.1
    # Control: the box is what bounds it, so a scale does change it.
    assert float(calibrated_loss(0.3 * logits, targets)) > loss + 0.01


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 2), (3, 5), (60, 4), (40, 16)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("known", [0.0, 40.0])
def test_it_is_from_zero_to_that_of_no_knowledge_and_to_cross_entropy(rows, classes, scale, known):
    logits, targets = cloud(rows, classes, scale=scale, known=known)
    found = calibration(logits, targets)
    assert -1e-9 <= found.loss <= min(math.log(classes), float(cross_entropy(logits, targets))) + 1e-9
    assert 0 <= found.gap <= 1e-9
    assert found.weights.abs().max() <= 1


def descended(logits, targets, steps):
    """The least loss that many steps of projected gradient descent find."""
    classes = logits.shape[1]
    weights = torch.zeros(classes, classes, dtype=torch.float64, requires_grad=True)
    size = 1 / float(torch.linalg.eigvalsh(logits.T @ logits / len(logits)).max())
    for _ in range(steps):
        [gradient] = torch.autograd.grad(cross_entropy(logits @ weights, targets), weights)
        weights = (weights - size * gradient).detach().clamp(-1, 1).requires_grad_()
    return float(cross_entropy(logits @ weights.detach(), targets))


@pytest.mark.parametrize("seed", range(3))
def test_no_descent_gets_below_it_by_more_than_the_gap(seed):
    logits, targets = cloud(37, 3, seed=seed, scale=2.0, known=1.5)
    found = calibration(logits, targets, tolerance=1e-11)
    assert descended(logits, targets, 1500) == pytest.approx(found.loss, abs=1e-7)
    assert descended(logits, targets, 1500) >= found.loss - found.gap - 1e-14
    assert descended(logits, targets, 3) > found.loss + 1e-4  # control


def test_the_gap_bounds_the_error_at_any_tolerance():
    logits, targets = cloud(50, 4, known=2.0)
    best = calibration(logits, targets, tolerance=1e-12).loss
    errors = []
    for tolerance in (1.0, 1e-1, 1e-2, 1e-4):
        found = calibration(logits, targets, tolerance=tolerance)
        errors.append(found.loss - best)
        assert errors[-1] <= found.gap <= tolerance
    assert errors[0] > 1e-2  # control: it does stop early


@pytest.mark.parametrize("known", [0.5, 4.0])
def test_its_derivative_is_that_of_finite_differences(known):
    """By the envelope theorem W may count as a constant, although it moves with the logits."""
    logits, targets = cloud(6, 3, seed=2, scale=1.3, known=known)
    logits.requires_grad_()
    [ours] = torch.autograd.grad(calibrated_loss(logits, targets, tolerance=1e-13), logits)
    differences = torch.zeros_like(ours)
    size = 1e-4
    for place in range(logits.numel()):
        ends = []
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved.view(-1)[place] += sign * size
            ends.append(calibration(moved, targets, tolerance=1e-13).loss)
        differences.view(-1)[place] = (ends[0] - ends[1]) / (2 * size)
    assert torch.allclose(ours, differences, rtol=1e-5, atol=1e-7)
    [raw] = torch.autograd.grad(cross_entropy(logits, targets), logits)
    assert not torch.allclose(raw, differences, rtol=0.1)  # control


def test_rows_of_several_processes_count_together():
    """Each process has its own rows; what they add up is given back to all."""
    logits, targets = cloud(20, 3, known=1.0)
    whole = calibration(logits, targets)
    # Two processes with the same rows: sums double, the mean does not.
    twice = calibration(logits, targets, summed=lambda tensor: 2 * tensor)
    assert twice.loss == pytest.approx(whole.loss, abs=1e-9)
    assert torch.allclose(twice.weights, whole.weights, atol=1e-6)


def test_logits_that_are_not_finite_give_a_loss_that_is_not():
    logits, targets = cloud(5, 3)
    logits[0, 0] = float("nan")
    assert math.isnan(float(calibrated_loss(logits, targets)))


def test_a_tolerance_out_of_reach_is_said():
    logits, targets = cloud(30, 3, scale=10.0)
    with pytest.raises(OutputError, match="known to"):
        calibration(logits, targets, tolerance=-1.0)


def test_float32_logits_are_calibrated_in_float64():
    logits, targets = cloud(30, 4, known=2.0)
    narrow = calibration(logits.float(), targets)
    assert narrow.weights.dtype == torch.float64
    assert narrow.loss == pytest.approx(calibration(logits, targets).loss, abs=1e-6)
    assert calibrated_loss(logits.float(), targets).dtype == torch.float32
