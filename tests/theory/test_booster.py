"""What must be true of Booster, whatever its code."""

import pytest
import torch
from objectives import adapted, apart, batch, flat, gradients, split

from surgery.errors import UsageError
from surgery.methods import booster
from surgery.methods.booster import Booster, attenuated, stepped
from surgery.train.sft import SFT
from surgery.train.step import Step

CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)
POINT = (1.0, 0.5)
ALPHA = 0.1


def data(*, aligned=1, harmful=2):
    return {"aligned": [batch(aligned)], "harmful": [batch(harmful)]}


def quadratic(scale=1.0):
    """h = scale/2 w^T A w at w = (1, 0.5), and the call that adds its gradient."""
    weight = torch.nn.Parameter(torch.tensor(POINT, dtype=torch.float64))

    def descend():
        loss = scale * 0.5 * (CURVATURE * weight.square()).sum()
        loss.backward()
        return loss.detach()

    return weight, descend


def regulariser(point):
    """h(w) - h(w - alpha g/||g||) of the quadratic, in closed form."""
    gradient = CURVATURE * point
    moved = point - ALPHA * gradient / gradient.norm()
    return 0.5 * (CURVATURE * (point.square() - moved.square())).sum()


def test_the_gradient_on_a_quadratic_is_the_first_order_one_and_not_the_exact_one():
    weight, descend = quadratic()
    [gained], before, after = attenuated([weight], descend, ALPHA, Step(0, 1))
    assert gained.tolist() == pytest.approx([0.0196, 0.9806], abs=5e-5)
    point = torch.tensor(POINT, dtype=torch.float64)
    assert before - after == pytest.approx(float(regulariser(point)), rel=1e-6)
    steps = 1e-6 * torch.eye(2, dtype=torch.float64)
    exact = [float((regulariser(point + step) - regulariser(point - step)) / 2e-6) for step in steps]
    assert exact == pytest.approx([0.02294, 0.97392], abs=5e-5)
    assert gained.tolist() != pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("scale", [1.0, 37.0])
def test_the_simulated_step_has_length_alpha_over_all_weights_whatever_the_scale_of_the_loss(scale):
    weight, descend = quadratic(scale)
    other = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    descend()
    (scale * 3 * other).sum().backward()
    before = [one.detach().clone() for one in (weight, other)]
    with stepped([weight, other], ALPHA):
        first, second = (
            (one.detach() - was).norm() for one, was in zip((weight, other), before, strict=True)
        )
        assert float(torch.hypot(first, second)) == pytest.approx(ALPHA, rel=1e-6)
        assert float(first) < 0.99 * ALPHA  # control: the norm is not one for each tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_put_back_bit_by_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 7, generator=generator).to(dtype))
    weight.grad = torch.randn(300, 7, generator=generator).to(dtype)
    before = weight.detach().clone()
    with stepped([weight], 3.0):
        step = weight.detach() - before
        assert step.any()
    assert torch.equal(weight.detach(), before)
    assert not torch.equal(before + step - step, before)  # control: taken off and added again


def test_weights_are_put_back_after_an_error():
    weight, descend = quadratic()
    descend()
    with pytest.raises(RuntimeError, match="stop"), stepped([weight], ALPHA):
        raise RuntimeError("stop")
    assert weight.tolist() == list(POINT)


@pytest.mark.parametrize("method", [Booster(lam=0.0), Booster(alpha=0.0)], ids=["lam", "alpha"])
def test_without_its_term_it_is_plain_training_to_the_last_bit(method):
    model = adapted(dropout=0.3)

    def found(one, rows):
        torch.manual_seed(5)
        return gradients(one, model, rows)[1]

    plain, ours = found(SFT(), data()), found(method, data())
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert apart(found(Booster(), data()), plain) > 0.1  # control


def test_the_gradient_is_that_of_its_three_terms():
    model, rows, method = adapted(), data(), Booster(lam=3.0, alpha=0.2)
    terms, found = gradients(method, model, rows)
    aligned = gradients(SFT(), model, rows)[1]
    harmful = gradients(SFT(), model, {"aligned": rows["harmful"]})[1]
    norm = flat(harmful).norm()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.sub_(harmful[name], alpha=float(0.2 / norm))
    after = gradients(SFT(), model, {"aligned": rows["harmful"]})
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(before[name])
    wanted = {name: aligned[name] + 3 * (harmful[name] - after[1][name]) for name in weights}
    assert apart(found, wanted) < 1e-5
    assert terms["after_step"] == pytest.approx(after[0]["loss"], rel=1e-5)
    assert terms["loss"] == pytest.approx(
        terms["aligned"] + 3 * (terms["harmful"] - terms["after_step"]), rel=1e-6
    )
    without_norm = {name: aligned[name] + 3 * harmful[name] for name in weights}
    assert apart(found, without_norm) > 0.1  # control: the last term counts


def test_what_a_small_step_gains_is_alpha_times_the_norm():
    model, rows = adapted().double(), data()
    norm = float(flat(gradients(SFT(), model, {"aligned": rows["harmful"]})[1]).norm())
    gains = [
        (lambda terms: terms["harmful"] - terms["after_step"])(
            gradients(Booster(alpha=alpha), model, rows)[0]
        )
        for alpha in (1e-2, 2.0)
    ]
    assert gains[0] == pytest.approx(1e-2 * norm, rel=0.03)
    assert gains[1] != pytest.approx(2.0 * norm, rel=0.03)  # control: not linear further off


def test_micro_batches_do_not_change_the_gradient():
    model, rows = adapted(), {"aligned": batch(1, rows=4), "harmful": batch(2, rows=4)}
    whole = gradients(Booster(), model, {name: [one] for name, one in rows.items()})[1]
    parts = {name: split(one, 1, 3) for name, one in rows.items()}
    assert apart(gradients(Booster(), model, parts)[1], whole) < 2e-5
    # Control: a norm for each micro-batch is another method.
    each = [
        gradients(Booster(lam=1.0), model, {"aligned": [rows["aligned"]], "harmful": [part]})[1]
        for part in parts["harmful"]
    ]
    plain = gradients(SFT(), model, {"aligned": [rows["aligned"]]})[1]
    mixed = {name: plain[name] + sum(one[name] - plain[name] for one in each) / 2 for name in plain}
    together = gradients(Booster(lam=1.0), model, {name: [one] for name, one in rows.items()})[1]
    assert apart(mixed, together) > 1e-3


def test_both_harmful_passes_have_the_same_dropout():
    model, rows = adapted(dropout=0.5), data()
    torch.manual_seed(3)
    terms = gradients(Booster(alpha=0.0), model, rows)[0]
    assert terms["harmful"] == terms["after_step"]
    torch.manual_seed(3)
    one, two = (gradients(SFT(), model, {"aligned": rows["harmful"]})[0]["loss"] for _ in range(2))
    assert one != two  # control: masks do differ from pass to pass


def trained(model, rows, method, steps=40):
    """The harmful loss before and after some steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=2e-2)
    losses = []
    for number in range(steps):
        optimiser.zero_grad(set_to_none=True)
        losses.append(method.backward(model, rows, Step(number, steps))["harmful"])
        optimiser.step()
    return losses[0], losses[-1]


def test_without_its_last_term_it_trains_on_harmful_data(monkeypatch):
    rows, method = data(), Booster(lam=5.0, alpha=0.1)
    before, after = trained(adapted(seed=4), rows, method)

    def without(weights, descend, alpha, step):
        loss = step.summed(descend())
        own = [weight.grad for weight in weights]
        booster._forget(weights)
        return own, float(loss), 0.0

    monkeypatch.setattr(booster, "attenuated", without)
    _, trained_on = trained(adapted(seed=4), rows, method)
    assert before - trained_on > 0.1 * before
    assert before - after < 0.3 * (before - trained_on)


@pytest.mark.parametrize("changes", [{"lam": -1.0}, {"alpha": float("nan")}, {"alpha": -0.1}], ids=str)
def test_numbers_that_make_no_sense_are_refused(changes):
    with pytest.raises(UsageError, match="at least 0"):
        Booster(**changes)


def test_both_forms_are_one():
    model = adapted()
    one, two = (gradients(Booster(form=form), model, data())[1] for form in ("paper", "tutorial"))
    assert all(torch.equal(one[name], two[name]) for name in one)
