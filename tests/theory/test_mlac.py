"""What must be true of MLAC on a language model, whatever its code."""

import pytest
import torch
from objectives import VOCABULARY, adapted, apart, batch, flat, gradients, split
from torch.nn.functional import cross_entropy

from surgery import resources
from surgery.errors import InputError, ResourceError, UsageError
from surgery.methods.mlac import MLAC
from surgery.train import bounded, censoring
from surgery.train.calibration import calibrated_loss
from surgery.train.sft import SFT
from surgery.train.step import Batch, Step
from surgery.train.tokens import Example

RATE = 5e-3
# At the usual constant a step of Adam is all but the sign of a small gradient, which differences cannot follow.
EPS = 1e-3
WAYS = {"exact": False, "first order": True}
LABELS = (11, 42, 7)


def mlac(**changes):
    return MLAC(**{"inner_steps": 3, "inner_lr": RATE, "inner_eps": EPS, **changes})


def data(method, seed=0, rows=3):
    attack = [batch(seed + 10 + number, rows=rows) for number in range(method.inner_steps)]
    sets = {
        name: [batch(seed + number, rows=rows)]
        for number, name in enumerate(("aligned", "retain", "held_out"))
    }
    return {**sets, **({"attack": attack} if attack else {})}


def precise(**options):
    """GPT-2, which computes in float64 where its weights are float64 (a Llama norm does not)."""
    return adapted("gpt2", **options).double()


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def direction(model, seed=3):
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=source).to(weight)
        for name, weight in trained(model).items()
    }


def moved(model, along, size):
    with torch.no_grad():
        for name, weight in trained(model).items():
            weight.add_(along[name], alpha=size)


def slope_by_differences(method, model, rows, size=1e-6):
    """The derivative of the loss in a direction, and that direction."""
    along, ends = direction(model), []
    for sign in (1, -1):
        moved(model, along, sign * size)
        ends.append(gradients(method, model, rows)[0]["loss"])
        moved(model, along, -sign * size)
    return (ends[0] - ends[1]) / (2 * size), along


@pytest.mark.parametrize("changes", [{}, {"bound": "entropy"}, {"lam": 2.5, "inner_steps": 1}], ids=str)
def test_the_exact_gradient_is_that_of_finite_differences_and_the_first_order_one_is_not(changes):
    """The model's attention is a fused kernel, as usual, which has no second derivative of its own."""
    model, method = precise(), mlac(**changes)
    assert model.get_base_model().config._attn_implementation == "sdpa"
    rows = data(method)
    differences, along = slope_by_differences(method, model, rows)
    exact, first = (
        float((flat(gradients(mlac(first_order=order, **changes), model, rows)[1]) * flat(along)).sum())
        for order in (False, True)
    )
    assert exact == pytest.approx(differences, rel=2e-5)
    assert first != pytest.approx(differences, rel=1e-2)


def test_both_orders_take_the_same_steps():
    model, method = precise(), mlac()
    exact, first = (
        gradients(mlac(first_order=order, inner_eps=1e-8), model, data(method))[0] for order in (False, True)
    )
    assert exact == pytest.approx(first, rel=1e-4)
    assert first["attacker_end"] < first["attacker"]


def harmful_gradient(model, part, share=1.0):
    """Of the clamped cross-entropy of a micro-batch's answers, on its own."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=part.tokens, attention_mask=part.attended).logits[:, :-1][part.answered[:, 1:]]
    losses = cross_entropy(logits, part.tokens[:, 1:][part.answered[:, 1:]], reduction="none")
    (share * losses.clamp(max=torch.tensor(VOCABULARY).log().item()).mean()).backward()
    found = {name: weight.grad for name, weight in trained(model).items()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("order", WAYS)
def test_without_steps_it_is_the_desired_loss_less_the_harmful_one(order):
    model, method = precise(), mlac(inner_steps=0, lam=1.5, first_order=WAYS[order])
    rows = data(method)
    ours = gradients(method, model, rows)[1]
    aligned, retain = (gradients(SFT(), model, {"aligned": rows[name]})[1] for name in ("aligned", "retain"))
    harmful = harmful_gradient(model, rows["held_out"][0])
    wanted = {name: 0.5 * (aligned[name] + retain[name]) - 1.5 * harmful[name] for name in ours}
    assert apart(ours, wanted) < 1e-9
    other = gradients(mlac(inner_steps=1, lam=1.5), model, data(mlac(inner_steps=1)))[1]
    assert apart(other, wanted) > 1e-2  # control


@pytest.mark.parametrize("order", WAYS)
def test_without_weight_it_is_plain_training_on_what_is_desired(order):
    model, method = precise(), mlac(lam=0.0, first_order=WAYS[order])
    rows = data(method)
    both = [gradients(SFT(), model, {"aligned": rows[name]})[1] for name in ("aligned", "retain")]
    mean = {name: 0.5 * (both[0][name] + both[1][name]) for name in both[0]}
    assert apart(gradients(method, model, rows)[1], mean) < 1e-9
    assert apart(gradients(mlac(first_order=WAYS[order]), model, rows)[1], mean) > 1e-2  # control


@pytest.mark.parametrize("order", WAYS)
def test_micro_batches_do_not_change_the_gradient(order):
    model, method = adapted(), mlac(first_order=WAYS[order])
    whole = {name: [batch(10 * place + number, rows=4) for number, _ in enumerate(parts)]
             for place, (name, parts) in enumerate(data(method).items())}  # fmt: skip
    parts = {name: [part for one in several for part in split(one, 1, 3)] for name, several in whole.items()}
    one, other = (gradients(method, model, rows)[1] for rows in (whole, parts))
    assert apart(other, one) < 2e-3
    fewer = {**parts, "attack": parts["attack"][::2]}
    assert apart(gradients(mlac(first_order=WAYS[order], inner_steps=3), model, fewer)[1], one) > 1e-2


@pytest.mark.parametrize("order", WAYS)
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "bfloat16 weights"])
def test_weights_are_left_bit_by_bit(order, full):
    model = adapted()
    if full:
        model = model.get_base_model().requires_grad_(True).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients(mlac(first_order=WAYS[order]), model, data(mlac()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", WAYS)
def test_the_attackers_rate_goes_down_what_the_model_goes_up(order):
    """The derivative in the rate: exact by differences; either way the rate that hurts more is approached."""
    model, method = precise(), mlac(first_order=WAYS[order])
    rows = data(method)
    slopes = {}
    for rate in (RATE * (1 - 1e-4), RATE, RATE * (1 + 1e-4)):
        slopes[rate] = gradients(mlac(inner_lr=rate, first_order=WAYS[order]), model, rows)[0]["harmful"]
    low, _, high = slopes.values()
    differences = (high - low) / (2e-4 * RATE)
    step = Step(0, 10)
    terms = gradients(method, model, rows, step)[0]
    assert terms["rate"] == RATE
    assert (step.memory["rate"] - RATE) * differences < 0
    with_it = gradients(mlac(first_order=WAYS[order]), model, rows, step)[0]["harmful"]
    assert with_it < terms["harmful"]
    # Control: along the sign that the weights are given, the attacker would do worse.
    away = 2 * RATE - step.memory["rate"]
    against = gradients(mlac(inner_lr=away, first_order=WAYS[order]), model, rows)[0]["harmful"]
    assert against > terms["harmful"]


def test_the_derivative_in_the_rate_is_that_of_finite_differences():
    model, method = precise(), mlac(lam=2.0)
    rows, lessons = data(method), [[one] for one in data(method)["attack"]]

    def found(rate):
        inner = censoring.Inner(rate, EPS, "clamped", (), False)
        result = censoring.exact(model, lessons, rows["held_out"], inner, 2.0, Step(0, 1))
        model.zero_grad(set_to_none=True)
        return result

    size = 2.0**-20
    differences = (found(RATE + size)[0]["harmful"] - found(RATE - size)[0]["harmful"]) / (2 * size)
    assert found(RATE)[1] == pytest.approx(differences, rel=1e-3)
    assert abs(differences) > 0.1


def test_the_rate_stays_in_its_range_and_goes_on_where_a_stopped_run_left_it():
    for slope, end in ((1.0, 1e-6), (-1.0, 1e-2)):
        memory = {"rate": 3e-4}
        for _ in range(200):
            censoring.learn_rate(memory, slope, 1e-4)
        assert memory["rate"] == end
    reference = torch.nn.Parameter(torch.tensor(3e-4, dtype=torch.float64))
    optimiser, memory = torch.optim.Adam([reference], lr=1e-4), {"rate": 3e-4}
    for slope in (0.3, -0.1, 0.05, 0.2):
        reference.grad = torch.tensor(slope, dtype=torch.float64)
        optimiser.step()
        censoring.learn_rate(memory, slope, 1e-4)
        memory = dict(memory)  # as saved and read again
    assert memory["rate"] == pytest.approx(float(reference.detach()), rel=1e-9)


def labelled(seed, *, rows=6):
    """Rows whose answers hold label tokens at their end."""
    part = batch(seed, rows=rows, padding=())
    tokens = part.tokens.clone()
    tokens[:, -1] = torch.tensor(LABELS).repeat(rows)[:rows]
    return Batch(tokens, part.attended, part.answered)


def test_label_tokens_get_the_calibrated_loss_which_no_exchange_of_labels_raises():
    model, method = precise(), mlac(inner_steps=0, labels="11,42,7")
    rows = {**data(method), "held_out": [labelled(5)]}
    part = rows["held_out"][0]
    answered = part.answered[:, 1:]
    targets = part.tokens[:, 1:][answered]
    with torch.no_grad():
        logits = model(input_ids=part.tokens, attention_mask=part.attended).logits[:, :-1][answered]
    kept = torch.isin(targets, torch.tensor(LABELS))
    which = (targets[kept][:, None] == torch.tensor(LABELS)).int().argmax(-1)
    chosen = logits[kept][:, list(LABELS)]
    expected = float(calibrated_loss(chosen, which))
    assert gradients(method, model, rows)[0]["harmful"] == pytest.approx(expected, abs=1e-6)
    exchanged = logits.clone()
    exchanged[:, list(LABELS)] = logits[:, [LABELS[1], LABELS[2], LABELS[0]]]
    assert float(calibrated_loss(exchanged[kept][:, list(LABELS)], which)) == pytest.approx(
        expected, abs=1e-8
    )
    assert float(cross_entropy(exchanged[kept], targets[kept])) != pytest.approx(
        float(cross_entropy(logits[kept], targets[kept])), rel=1e-3
    )  # control


def test_the_gradient_of_the_calibrated_loss_is_exact_too():
    model, method = precise(), mlac(inner_steps=2, labels="11,42,7")
    rows = {**data(method), "held_out": [labelled(5)]}
    differences, along = slope_by_differences(method, model, rows, size=3e-6)
    ours = float((flat(gradients(method, model, rows)[1]) * flat(along)).sum())
    assert ours == pytest.approx(differences, rel=1e-3)


@pytest.mark.parametrize("bound", ["clamped", "entropy"])
def test_bounded_losses_are_from_zero_to_that_of_no_knowledge(bound):
    source = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(200, 9, generator=source)
    targets = torch.randint(9, (200,), generator=source)
    losses = bounded.per_token(logits, targets, bound)
    limit = torch.tensor(9.0).log()
    assert losses.min() >= 0
    assert losses.max() <= limit + 1e-6
    assert cross_entropy(logits, targets) > limit  # control
    flat_ones = bounded.per_token(torch.zeros(3, 9), targets[:3], bound)
    assert torch.allclose(flat_ones, limit.expand(3))


def test_the_clamp_ends_the_gradient_where_nothing_is_known():
    logits = torch.tensor([[9.0, 0.0], [0.3, 0.0]], requires_grad=True)
    targets = torch.tensor([1, 1])
    bounded.per_token(logits, targets, "clamped").sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0
    [raw] = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    assert raw.abs().min() > 0.1  # control


def test_the_tutorials_form_takes_the_last_step_alone():
    model = precise()
    method = mlac(form="tutorial", epsilon=0.0, multiplier_step=0.0)
    rows = data(method)
    terms = gradients(method, model, rows)[0]
    assert terms["harmful"] == terms["harmful_end"]
    assert gradients(mlac(), model, rows)[0]["harmful"] != pytest.approx(terms["harmful"], rel=1e-4)
    differences, along = slope_by_differences(method, model, rows)
    ours = float((flat(gradients(method, model, rows)[1]) * flat(along)).sum())
    assert ours == pytest.approx(differences, rel=2e-5)


def test_the_multiplier_grows_while_the_bound_is_violated_and_never_falls_below_zero():
    model, rows = adapted(), data(mlac())
    for epsilon, wanted in ((0.0, lambda now, before: now > before), (1e6, lambda now, before: now == 0.0)):
        method, step = mlac(form="tutorial", epsilon=epsilon, first_order=True), Step(0, 10)
        before = gradients(method, model, rows, step)[0]["multiplier"]
        assert wanted(gradients(method, model, rows, step)[0]["multiplier"], before)
        assert step.memory["multiplier"] >= 0


def test_too_little_memory_is_said_before_a_step_is_taken(monkeypatch):
    model, method = adapted(), mlac()
    monkeypatch.setattr(resources, "memory_available", lambda: 1 << 16)
    with pytest.raises(ResourceError, match="--first-order") as error:
        gradients(method, model, data(method))
    assert error.value.exit_code == 4
    gradients(mlac(first_order=True), model, data(method))


def test_several_processes_need_the_first_order():
    model, method = adapted(), mlac()
    step = Step(0, 1, summed=lambda tensor: 2 * tensor)
    with pytest.raises(UsageError, match="--first-order"):
        gradients(method, model, data(method), step)


def test_computing_activations_again_needs_the_first_order():
    model = adapted()
    model.get_base_model().model.layers[0].gradient_checkpointing = True
    with pytest.raises(UsageError, match="--first-order"):
        mlac().prepare(model)
    mlac(first_order=True).prepare(model)


def examples(prompts, answers=2):
    return [
        Example((prompt + 2, 30, 31, answer + 40, LABELS[answer]), 2)
        for prompt in range(prompts)
        for answer in range(answers)
    ]


def test_rows_measured_on_have_prompts_that_the_attacker_never_sees():
    rows = examples(20)
    streams = mlac().streams({"aligned": rows, "retain": rows, "harmful": rows}, 0)
    seen, unseen = ({row.tokens[:2] for row in streams[name].rows} for name in ("attack", "held_out"))
    assert not seen & unseen
    assert len(seen | unseen) == 20
    assert streams["attack"].batches == 3
    assert "attack" not in mlac(inner_steps=0).streams({"aligned": rows, "retain": rows, "harmful": rows}, 0)
    with pytest.raises(InputError, match="2 or more"):
        mlac().streams({"aligned": rows, "retain": rows, "harmful": examples(1)}, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_steps": -1}, "at least 0"),
        ({"lam": -1.0}, "at least 0"),
        ({"inner_lr": 0.0}, "above 0"),
        ({"labels": "5"}, "2 to 16"),
        ({"labels": "5,5"}, "2 to 16"),
        ({"labels": "a,b"}, "2 to 16"),
        ({"bound": "calibrated"}, "--labels"),
        ({"bound": "clamped", "labels": "1,2"}, "contradict"),
        ({"epsilon": -1.0, "form": "tutorial"}, "at least 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        MLAC(**changes)
