"""Condition Number on language models: moments of a whole step, their derivative, what does not depend on what."""

import math

import pytest
import torch
from objectives import adapted, apart, batch, gradients, hooks, split

from surgery.conditioning import regularisers
from surgery.errors import UsageError
from surgery.methods.condition_number import ConditionNumber
from surgery.train import blocks
from surgery.train.losses import answer_loss, answered_count
from surgery.train.moments import moments
from surgery.train.running import immunise
from surgery.train.step import Step
from surgery.train.training import Training

STEP = Step(0, 10)
STRONG = ConditionNumber(lam_well=50.0, lam_ill=2.0, targets="2,3")


def states(tokens, width, *, seed=0, dtype=torch.float64):
    """Correlated rows with a mean."""
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=source, dtype=torch.float64)
    rows = torch.randn(tokens, width, generator=source, dtype=torch.float64) @ mixing
    return (rows + torch.randn(width, generator=source, dtype=torch.float64)).to(dtype)


def data(seed=1):
    return {"harmful": [batch(seed)], "retain": [batch(seed + 1)]}


# Moments.


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(5, 12), (12, 12), (40, 7)])
def test_eigenvalues_are_the_squared_singular_values(tokens, width, centred):
    rows = states(tokens, width)
    found = moments(rows, STEP, centred=centred)
    moved = rows - rows.mean(0) if centred else rows
    wanted = torch.linalg.svdvals(moved).square() / tokens
    size = min(tokens - centred, width)
    assert len(found.values) == size
    assert torch.allclose(found.values, wanted[:size], rtol=1e-10)
    assert found.kappa == pytest.approx(float(wanted[0] / wanted[size - 1]), rel=1e-8)


@pytest.mark.parametrize("kind", ["well", "ill", "neg_well"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(6, 9), (20, 6)])
def test_the_derivative_is_that_of_finite_differences(kind, centred, tokens, width):
    rows = states(tokens, width, seed=3)
    value, slopes = moments(rows, STEP, centred=centred).regulariser(kind)
    way = torch.randn(tokens, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sides = [
        moments(rows + sign * 1e-6 * way, STEP, centred=centred).regulariser(kind)[0] for sign in (1, -1)
    ]
    assert value == pytest.approx(sum(sides) / 2, rel=1e-8)
    slope = (sides[0] - sides[1]) / 2e-6
    assert float((slopes * way).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7 * abs(value))


@pytest.mark.parametrize("kind", ["well", "ill"])
def test_the_size_of_the_states_changes_nothing(kind):
    rows = states(9, 12)
    value, _ = moments(rows, STEP, centred=False).regulariser(kind)
    assert moments(40 * rows, STEP, centred=False).regulariser(kind)[0] == pytest.approx(value, rel=1e-9)
    values = torch.linalg.svdvals(rows).square()
    assert regularisers.regulariser(kind, values) != pytest.approx(value, rel=0.1)  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(30, 64), (200, 64)])
def test_rounding_is_not_taken_for_rank(dtype, tokens, width):
    """States of rank 5, rounded: without a bound that knows their dtype the rest would count."""
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, 5, generator=source) @ torch.randn(5, width, generator=source)
    found = moments(rows.to(dtype), STEP, centred=False)
    exact = moments(rows.double(), STEP, centred=False)
    assert regularisers.rank_of(found.values, found.zero) == 5
    assert found.kappa == pytest.approx(float(exact.values[0] / exact.values[4]), rel=0.05)
    if dtype != torch.float32:  # its square is below the rounding of float64
        assert regularisers.rank_of(found.values) > 5  # control


def test_nothing_at_all_is_no_error():
    found = moments(torch.zeros(3, 4), STEP, centred=False)
    assert found.kappa == math.inf


# The gradient.


def objective(method, model, whole):
    """The loss of a step in one graph, from hidden states as transformers gives them."""
    total = answer_loss(model, whole["retain"], count=answered_count([whole["retain"]], STEP))
    targets = method.targets_of(4)
    for name, kind, weight in (("retain", "well", method.lam_well), ("harmful", "ill", method.lam_ill)):
        rows = whole[name]
        found = model(input_ids=rows.tokens, attention_mask=rows.attended, output_hidden_states=True)
        for target in targets:
            values = torch.linalg.svdvals(found.hidden_states[target][rows.answered]).square()
            value = regularisers.regulariser(kind, values / values.sum())
            total = total + weight / len(targets) * value / (len(values) if kind == "ill" else 1)
    return total


def wanted(method, model, whole):
    model.zero_grad(set_to_none=True)
    loss = objective(method, model, whole)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_it_is_the_gradient_of_the_whole_step_however_it_is_split(sizes):
    model, whole = adapted(dtype=torch.float64), {"harmful": batch(1), "retain": batch(2)}
    loss, exact = wanted(STRONG, model, whole)
    terms, found = gradients(STRONG, model, {name: split(rows, *sizes) for name, rows in whole.items()})
    assert terms["loss"] == pytest.approx(loss, rel=1e-9)
    assert apart(found, exact) < 1e-7
    # Controls: either term counts.
    for off in (ConditionNumber(lam_well=0.0, lam_ill=2.0), ConditionNumber(lam_well=50.0, lam_ill=0.0)):
        assert apart(found, gradients(off, model, {name: [rows] for name, rows in whole.items()})[1]) > 0.01


def test_moments_of_each_micro_batch_apart_would_be_another_objective():
    model, whole = adapted(dtype=torch.float64), {"harmful": batch(1), "retain": batch(2)}
    _, exact = wanted(STRONG, model, whole)
    parts = {name: split(rows, 1, 2) for name, rows in whole.items()}
    each = [gradients(STRONG, model, {name: [parts[name][place]] for name in parts})[1] for place in range(2)]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in exact if exact[name] is not None}
    assert apart(mean, exact) > 0.05


def test_with_dropout_both_runs_of_a_micro_batch_are_the_same():
    model, whole = adapted(dtype=torch.float64, dropout=0.3), {"harmful": batch(1), "retain": batch(2)}
    parts = {name: split(rows, 1, 2) for name, rows in whole.items()}

    def slope(size, way):
        with torch.no_grad():
            for weight, one in way:
                weight.add_(size * one)
        torch.manual_seed(5)
        terms, found = gradients(STRONG, model, parts)
        with torch.no_grad():
            for weight, one in way:
                weight.sub_(size * one)
        return terms["loss"], found

    source = torch.Generator().manual_seed(8)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    way = [(weight, torch.randn(weight.shape, generator=source, dtype=weight.dtype)) for weight in weights]
    sides = [slope(size, way)[0] for size in (1e-4, -1e-4)]
    found = slope(0.0, way)[1]
    along = sum(float((found[name] * one).sum()) for name, (_, one) in zip(found, way, strict=True))
    assert along == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-4)


def test_without_its_terms_it_is_plain_training_on_retain_rows():
    model = adapted()
    _, found = gradients(ConditionNumber(lam_well=0.0, lam_ill=0.0), model, data())
    model.zero_grad(set_to_none=True)
    rows = data()["retain"][0]
    answer_loss(model, rows, count=answered_count([rows], STEP)).backward()
    plain = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert apart(found, plain) < 1e-6


def test_the_tutorials_form_is_minus_r_well():
    model, rows = adapted(), data()
    terms, _ = gradients(ConditionNumber(form="tutorial"), model, rows)
    swapped, _ = gradients(ConditionNumber(), model, {"harmful": rows["harmful"], "retain": rows["harmful"]})
    assert terms["ill"] == pytest.approx(-swapped["well"], rel=1e-6)
    assert terms["ill"] < 0 < swapped["ill"]


def test_nothing_stays_behind_and_only_the_needed_blocks_run():
    model, ran = adapted(), []
    found = blocks.find(model)
    for index, layer in enumerate(found.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    before = hooks(model)
    gradients(ConditionNumber(targets="2"), model, data())
    assert hooks(model) == before
    assert ran == [0, 1, *range(4)]
    assert len(blocks.find(model).layers) == 4


def test_targets_are_checked():
    assert ConditionNumber().targets_of(32) == [20]
    assert ConditionNumber().targets_of(1) == [1]
    assert ConditionNumber(targets="3,1").targets_of(4) == [1, 3]
    with pytest.raises(UsageError, match="has 4 layers: name 1 to 4"):
        ConditionNumber(targets="5").prepare(adapted())
    with pytest.raises(UsageError, match="at least 1, as in --targets"):
        ConditionNumber(targets="0")
    with pytest.raises(UsageError, match="lam-ill is -1"):
        ConditionNumber(lam_ill=-1.0)


@pytest.mark.parametrize(
    ("method", "first", "retain", "advice"),
    [
        (
            ConditionNumber(lam_well=200.0),
            {"well": 0.16, "ill": 5.0},
            2.7,
            "32 of R_well and 2.5 of R_ill; take a smaller --lam-well or --lr",
        ),
        (ConditionNumber(), {"well": 0.16, "ill": 5.0}, 2.7, "--lam-ill"),
        (
            ConditionNumber(lam_well=200.0, form="tutorial"),
            {"well": 0.001, "ill": -20.0},
            2.7,
            "10 of R_ill; take a smaller --lam-ill",
        ),
        (ConditionNumber(lam_well=200.0), {"well": 0.16, "ill": 5.0}, 1.7, None),
        (ConditionNumber(lam_well=200.0), {"well": 0.16, "ill": 5.0}, 0.1, None),
    ],
)
def test_a_run_that_unlearns_innocent_answers_says_so(method, first, retain, advice):
    signs = method.signs({"retain": 0.8, **first}, {"retain": retain, "well": 0.0, "ill": 0.0})
    assert len(signs) == (advice is not None)
    assert all("retain rose from 0.80 to 2.70 nats" in sign and advice in sign for sign in signs)


@pytest.mark.parametrize(("lr", "unlearns"), [(5e-2, True), (1e-3, False)])
def test_a_run_is_judged_by_its_first_step_and_its_last(tmp_path, lr, unlearns):
    training = Training(steps=6, batch_size=4, lr=lr)
    done = immunise(ConditionNumber(), model="demo:aligned", output=tmp_path / "out", training=training)
    first, last = (done.history[at]["retain"] for at in (0, -1))
    assert (last > first + 1) == unlearns
    told = f"retain rose from {first:.2f} to {last:.2f} nats"
    assert any(told in note for note in done.notes) == unlearns
