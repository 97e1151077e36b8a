"""Derivatives through an attacker's steps, against finite differences in float64 and reference values."""

import pytest
import torch

from surgery.train.unrolled import SGD, Adam, trajectory

START = torch.tensor([0.5, 0.7], dtype=torch.float64)
STEPS = 8
WAYS = {"sgd": (SGD(), 0.02), "adam": (Adam(), 0.05)}
EXACT = {"sgd": (-2.2714824599, -1.2883677415), "adam": (-3.0841534643, -1.1934991493)}
FIRST = {"sgd": (-2.92448, -1.17501), "adam": (-3.09757, -1.20846)}


def harm(weights, number=0):
    del number
    x, y = weights["theta"]
    return (x - 2).square() + (1 - x * y).square() + 0.3 * torch.sin(3 * y)


def mean_harm(theta, way, *, exact=True, clip=None, rate=None):
    optimiser, usual = WAYS[way]
    path = trajectory(
        harm, {"theta": theta}, STEPS, optimiser, usual if rate is None else rate, exact=exact, clip=clip
    )
    return [harm(weights) for weights in path], theta


def exact_gradient(way, **options):
    theta = START.clone().requires_grad_()
    losses, _ = mean_harm(theta, way, **options)
    return torch.autograd.grad(torch.stack(losses).mean(), theta)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_exact_gradient_is_that_of_finite_differences(way, clip):
    """With the norm of a clipped gradient a constant, only the unclipped one has a derivative to compare with."""
    ours = exact_gradient(way, clip=clip)
    differences = []
    for step in 1e-6 * torch.eye(2, dtype=torch.float64):
        up, down = (
            torch.stack(mean_harm((START + sign * step).requires_grad_(), way, clip=clip)[0]).mean().item()
            for sign in (1, -1)
        )
        differences.append((up - down) / 2e-6)
    if clip is None:
        assert ours.tolist() == pytest.approx(differences, rel=1e-6)
        assert ours.tolist() == pytest.approx(EXACT[way], abs=1e-9)
    elif way == "sgd":
        assert ours.tolist() != pytest.approx(differences, rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_order_gradient_is_that_at_each_point_and_another_one(way):
    optimiser, rate = WAYS[way]
    total = torch.zeros(2, dtype=torch.float64)
    for weights in trajectory(harm, {"theta": START}, STEPS, optimiser, rate, exact=False):
        assert weights["theta"].is_leaf
        total += torch.autograd.grad(harm(weights), weights["theta"])[0] / STEPS
    assert total.tolist() == pytest.approx(FIRST[way], abs=5e-6)
    assert total.tolist() != pytest.approx(EXACT[way], rel=1e-3)


def test_both_go_the_same_way():
    exact = [
        weights["theta"].tolist()
        for weights in trajectory(harm, {"theta": START.clone().requires_grad_()}, 5, Adam(), 0.05)
    ]
    first = [
        weights["theta"].tolist()
        for weights in trajectory(harm, {"theta": START}, 5, Adam(), 0.05, exact=False)
    ]
    assert exact == first


def test_adam_is_torchs_adam():
    theta = torch.nn.Parameter(START.clone())
    optimiser = torch.optim.Adam([theta], lr=0.05)
    for weights in trajectory(harm, {"theta": START}, 12, Adam(), 0.05, exact=False):
        optimiser.zero_grad()
        harm({"theta": theta}).backward()
        optimiser.step()
        assert weights["theta"].tolist() == pytest.approx(theta.tolist(), rel=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_in_the_rate_is_that_of_finite_differences(way):
    usual = WAYS[way][1]
    rate = torch.tensor(usual, dtype=torch.float64, requires_grad=True)
    losses, _ = mean_harm(START.clone().requires_grad_(), way, rate=rate)
    ours = float(torch.autograd.grad(torch.stack(losses).mean(), rate)[0])
    up, down = (
        torch.stack(mean_harm(START.clone().requires_grad_(), way, rate=usual + size)[0]).mean().item()
        for size in (1e-7, -1e-7)
    )
    assert ours == pytest.approx((up - down) / 2e-7, rel=1e-5)
    assert abs(ours) > 1.0


def test_a_weight_without_gradient_makes_no_nan():
    """Control: without the constant under the root the derivative at a second moment of zero is infinite."""

    def gradient(adam):
        start = {
            name: torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for name in ("used", "idle")
        }

        def loss(weights, number):
            return weights["used"].square() + 0.0 * weights["idle"].square()

        for weights in trajectory(loss, start, 3, adam, 0.05):
            last = weights
        return torch.autograd.grad(last["used"] + last["idle"], list(start.values()))

    assert all(part.isfinite() for part in gradient(Adam()))
    assert not all(part.isfinite() for part in gradient(Adam(inside=0.0)))


def test_a_gradient_is_cut_to_the_norm_asked_for():
    [weights] = trajectory(harm, {"theta": START}, 1, SGD(), 1.0, clip=0.25)
    assert float((weights["theta"].detach() - START).norm()) == pytest.approx(0.25, rel=1e-4)
    [free] = trajectory(harm, {"theta": START}, 1, SGD(), 1.0, clip=100.0)
    assert float((free["theta"].detach() - START).norm()) > 1.0
