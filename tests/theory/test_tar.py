"""What must be true of TAR, whatever its code."""

import math

import pytest
import torch
from objectives import adapted, apart, batch, flat, gradients, hooks, model_of, split

from surgery.errors import InputError, UsageError
from surgery.methods.tar import TAR
from surgery.train import adversaries, perturb
from surgery.train.adversaries import Adversary, Mixture
from surgery.train.losses import answer_loss, answered_count
from surgery.train.parking import Original, parked
from surgery.train.resistance import minus_entropy, preference
from surgery.train.sft import SFT
from surgery.train.states import distance
from surgery.train.step import Step, batch_by_batch
from surgery.train.tokens import Example

RATE = 1e-2


def tar(**changes):
    usual = {
        "inner_steps": 4, "every": 2, "adversary_lr": str(RATE), "adversary_switch": 0.0, "positions": "attended",
    }  # fmt: skip
    return TAR(**{**usual, **changes})


def data(method, seed=0):
    count = method.inner_steps * method.attacks
    return {
        "attack": [batch(seed + 100 + number) for number in range(count)],
        "attack_retain": [batch(seed + 200 + number) for number in range(count)],
        "held_out": [batch(seed + 300 + number) for number in range(method.attacks)],
        "preferred": [batch(seed + 400 + number) for number in range(method.attacks)],
        "retain": [batch(seed + 500)],
    }


def step_of(model, number=0, **changes):
    return Step(number, 10, original=Original(model), **changes)


def found(method, model, batches=None, number=0):
    return gradients(method, model, batches or data(method), step_of(model, number))


def alone(**changes):
    """Resistance without anything to retain."""
    return tar(lam_tr=1.0, lam_retain=0.0, **changes)


def attacked(model, lessons, rate=RATE):
    """The model's trained weights after an attacker's steps, one by one, by a loop of its own."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate)
    for lesson in lessons:
        optimiser.zero_grad()
        answer_loss(model, lesson, count=answered_count([lesson], Step(0, 1))).backward()
        optimiser.step()
        yield
    optimiser.zero_grad()


def entropy_gradient(model, rows):
    """Minus the mean entropy over attended positions from whole logits in float64, and its gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=rows.tokens, attention_mask=rows.attended).logits.double()
    logs = logits.log_softmax(-1)
    loss = (logs.exp() * logs).sum(-1)[rows.attended].mean()
    loss.backward()
    gradient = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradient


def added(one, other, scale=1.0):
    return {name: one[name] + scale * other[name] for name in one}


# The gradient.


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_it_is_the_weighted_gradient_at_the_attacked_weights(full):
    model = model_of() if full else adapted()
    method, rows = alone(decay=0.3), None
    rows = data(method)
    terms, ours = found(method, model, rows)
    wanted, losses = None, []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with perturb.restored(weights):
        for taken, _ in enumerate(attacked(model, rows["attack"]), 1):
            if taken % 2 == 0:
                loss, gradient = entropy_gradient(model, rows["held_out"][0])
                share = math.exp(0.3 * (taken - 4))
                scaled = {name: share * part for name, part in gradient.items()}
                wanted = scaled if wanted is None else added(wanted, scaled)
                losses.append((share, loss))
    assert apart(ours, wanted) < 1e-5
    assert terms["loss"] == pytest.approx(sum(share * loss for share, loss in losses), rel=1e-5)
    assert terms["resistance"] == pytest.approx(losses[-1][1], rel=1e-5)
    assert apart(entropy_gradient(model, rows["held_out"][0])[1], wanted) > 0.05  # control: the attack counts


def test_it_is_first_order_and_not_the_derivative_through_the_attack():
    model = adapted().double()
    generator = torch.Generator().manual_seed(3)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    way = [torch.randn(weight.shape, generator=generator).double() for weight in weights]

    def slopes(method):
        rows = data(method)
        ours = found(method, model, rows)[1]
        own = sum(float((part * one).sum()) for part, one in zip(ours.values(), way, strict=True))
        values = []
        # Its norms are computed in float32: smaller steps would measure their rounding.
        for size in (3e-4, -3e-4):
            with perturb.restored(weights), torch.no_grad():
                for weight, one in zip(weights, way, strict=True):
                    weight.add_(size * one)
                with torch.enable_grad():
                    values.append(found(method, model, rows)[0]["loss"])
        return own, (values[0] - values[1]) / 6e-4

    own, exact = slopes(alone(inner_steps=4, every=4, adversary_lr="3e-2"))
    assert own != pytest.approx(exact, rel=0.02)
    own, exact = slopes(alone(inner_steps=0))
    assert own == pytest.approx(exact, rel=2e-3)  # control: without an attack there is one derivative


def test_the_gradient_is_linear_in_its_two_weights():
    model, rows = adapted(), data(tar())
    resist, retain = (found(tar(lam_tr=one, lam_retain=1.0 - one), model, rows)[1] for one in (1.0, 0.0))
    both = found(tar(lam_tr=3.0, lam_retain=0.5), model, rows)[1]
    wanted = {name: 3 * resist[name] + 0.5 * retain[name] for name in resist}
    assert apart(both, wanted) < 1e-5
    assert apart(both, resist) > 0.1


def test_an_attack_of_64_steps_is_measured_sixteen_times_with_the_papers_weights():
    shares = TAR().weights()
    assert list(shares) == list(range(4, 65, 4))
    assert list(shares.values()) == pytest.approx([math.exp(0.0625 * (i - 63)) for i in range(3, 64, 4)])
    assert sum(shares.values()) == pytest.approx(4.438, abs=5e-4)
    assert TAR(form="tutorial", attacks=5).weights() == {64: 0.2}


@pytest.mark.parametrize("none", [{"inner_steps": 0}, {"adversary_lr": "0"}], ids=["no step", "no rate"])
def test_without_an_attack_it_is_entropy_alone_at_the_weights(none):
    model, method = adapted(), alone(**none)
    rows = data(method)
    ours = found(method, model, rows)[1]
    total = sum(method.weights().values())
    wanted = {name: total * part for name, part in entropy_gradient(model, rows["held_out"][0])[1].items()}
    assert apart(ours, wanted) < 1e-5


def test_the_tutorials_form_is_the_mean_over_attacks_of_their_ends():
    model, method = adapted(), alone(form="tutorial", attacks=3)
    rows = data(method)
    terms, ours = found(method, model, rows)
    assert set(terms) == {"loss", "resistance", "attacker", "attacker_end", "retain"}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    ends = []
    for number in range(3):
        with perturb.restored(weights):
            for _ in attacked(model, rows["attack"][4 * number : 4 * number + 4]):
                pass
            ends.append(entropy_gradient(model, rows["held_out"][number]))
    wanted = {name: sum(end[1][name] for end in ends) / 3 for name in ours}
    assert apart(ours, wanted) < 1e-5
    assert terms["resistance"] == pytest.approx(sum(end[0] for end in ends) / 3, rel=1e-5)
    assert apart(ends[0][1], wanted) > 0.05


def test_micro_batches_do_not_change_the_gradient():
    model = adapted()
    whole = {
        name: [batch(number, rows=4) for number in range(count)]
        for name, count in (("attack", 4), ("attack_retain", 4), ("held_out", 1), ("retain", 1))
    }
    parts = {name: [part for one in rows for part in split(one, 1, 3)] for name, rows in whole.items()}
    ours = found(tar(), model, parts)[1]
    assert apart(ours, found(tar(), model, whole)[1]) < 5e-5
    assert [len(one) for one in batch_by_batch(parts["attack"], 4)] == [2, 2, 2, 2]


# What an attack leaves.


@pytest.mark.parametrize("fresh", [0.0, 1.0], ids=["own weights", "fresh LoRA"])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_nothing_of_an_attack_is_left(fresh, full):
    model = model_of() if full else adapted()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    carried = hooks(model)
    terms, _ = found(tar(adversary_lora=fresh), model)
    assert terms["attacker_end"] != terms["attacker"]
    assert all(torch.equal(weight.detach(), before[name]) for name, weight in model.named_parameters())
    assert hooks(model) == carried
    assert all(weight.requires_grad == ("lora" in name or full) for name, weight in model.named_parameters())


def test_an_attack_that_fails_leaves_nothing_either():
    model = adapted()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    rows = data(tar())
    with (
        pytest.raises(RuntimeError, match="stop"),
        adversaries.attacking(model, weights, Adversary(RATE, 0, False, 0), Step(0, 1)) as attack,
    ):
        attack.learn([rows["attack"][0]])
        assert not torch.equal(weights[0].detach(), before[0])
        raise RuntimeError("stop")
    assert all(torch.equal(weight.detach(), was) for weight, was in zip(weights, before, strict=True))


def test_no_optimiser_state_goes_from_one_step_to_the_next():
    model, method = adapted(), alone()
    first = found(method, model)[1]
    found(method, model, data(method, seed=50), number=1)
    again = found(method, model)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_runs_optimiser_is_put_aside_and_comes_back_bit_by_bit():
    weight = torch.nn.Parameter(torch.randn(40, 7, generator=torch.Generator().manual_seed(0)))
    optimiser = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    state = optimiser.state[weight]
    before = {name: value.clone() for name, value in state.items()}
    with parked(optimiser):
        assert state["exp_avg"].untyped_storage().nbytes() == 0
    assert all(torch.equal(state[name], value) for name, value in before.items())
    optimiser.step()
    assert not torch.equal(state["exp_avg"], before["exp_avg"])


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_the_model_as_it_was_is_compared_with_and_then_the_model_as_it_is(full):
    model = (model_of() if full else adapted(spread=0)).eval()
    rows = batch(3)

    def logits():
        with torch.no_grad():
            return model(input_ids=rows.tokens, attention_mask=rows.attended).logits

    first, original = logits(), Original(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    now = logits()
    with original():
        assert torch.equal(logits(), first)
    assert torch.equal(logits(), now)
    assert not torch.equal(now, first)


# Its losses.


def test_resistance_is_least_where_nothing_is_known_and_flat_there():
    model = model_of(vocab_size=64, tie_word_embeddings=False)
    measure = minus_entropy(model, [batch(1)], "all", Step(0, 1))
    assert -4.15888 < float(measure(1.0)) < 0
    slope = flat({name: weight.grad for name, weight in model.named_parameters()}).norm()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert float(measure(1.0)) == pytest.approx(-4.15888, abs=5e-6)
    assert all(weight.grad is None or not weight.grad.abs().max() > 1e-7 for weight in model.parameters())
    assert slope > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_the_entropy_is_that_of_the_logits_also_where_they_are_capped(architecture):
    capped = {"final_logit_softcapping": 0.1} if architecture == "gemma2" else {}
    model, rows = adapted(architecture, **capped), batch(2)
    loss, wanted = entropy_gradient(model, rows)
    model.zero_grad(set_to_none=True)
    found = float(minus_entropy(model, [rows], "attended", Step(0, 1))(1.0))
    ours = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert found == pytest.approx(loss, rel=1e-6)
    assert apart(ours, wanted) < 1e-5
    if capped:
        uncapped = adapted(architecture, final_logit_softcapping=None)
        assert entropy_gradient(uncapped, rows)[0] != pytest.approx(loss, rel=1e-4)


def test_padding_and_prompt_count_as_asked():
    model, rows = adapted(), batch(2)
    with torch.no_grad():
        logs = model(input_ids=rows.tokens, attention_mask=rows.attended).logits.log_softmax(-1)
    each = (logs.exp() * logs).sum(-1)
    masks = {"all": torch.ones_like(rows.attended), "attended": rows.attended, "answered": rows.answered}
    values = set()
    for where, mask in masks.items():
        value = float(minus_entropy(model, [rows], where, Step(0, 1))(1.0))
        assert value == pytest.approx(float(each[mask].mean()), rel=1e-6)
        values.add(round(value, 9))
    assert len(values) == 3


def test_preferences_are_the_dpo_loss_against_the_model_as_it_was():
    model = adapted()
    chosen, rejected = batch(1), batch(2)

    def likelihood(rows):
        logs = model(input_ids=rows.tokens, attention_mask=rows.attended).logits.double().log_softmax(-1)
        each = logs[:, :-1].gather(-1, rows.tokens[:, 1:, None])[..., 0]
        return (each * rows.answered[:, 1:]).sum(-1)

    with torch.no_grad():
        ours = likelihood(chosen) - likelihood(rejected)
        with model.disable_adapter():
            reference = likelihood(chosen) - likelihood(rejected)
    wanted = torch.nn.functional.softplus(-0.1 * (ours - reference)).mean()
    measure = preference(model, [chosen], [rejected], 0.1, step_of(model))
    assert float(measure(1.0)) == pytest.approx(float(wanted), rel=1e-6)
    assert float(wanted) != pytest.approx(math.log(2), rel=1e-4)
    same = adapted(spread=0)  # control: at the reference it is log 2
    measure = preference(same, [chosen], [rejected], 0.1, step_of(same))
    assert float(measure(1.0)) == pytest.approx(math.log(2), rel=1e-6)


def test_a_run_with_preferences_lowers_their_loss():
    model, method = adapted(), tar(resistance="dpo", lam_retain=0.0, inner_steps=2)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser, original, rows = torch.optim.AdamW(weights, lr=2e-3), Original(model), data(method)
    losses = []
    for number in range(15):
        optimiser.zero_grad()
        losses.append(method.backward(model, rows, Step(number, 15, original=original))["resistance"])
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_at_the_reference_the_distance_is_zero_and_has_a_finite_gradient():
    model, method = adapted(spread=0), tar(lam_tr=0.0)
    terms, ours = found(method, model)
    assert terms["distance"] == 0.0
    assert flat(ours).isfinite().all()
    plain = gradients(SFT(), model, {"aligned": data(method)["retain"]})[1]
    assert apart(ours, plain) < 1e-6  # what is left is cross-entropy


@pytest.mark.parametrize(("squared", "degree"), [(False, 1), (True, 2)])
def test_the_distance_is_of_degree_one_and_squared_of_degree_two(squared, degree):
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(2, 3, 5, generator=generator) for _ in range(4)]
    change = [torch.randn(2, 3, 5, generator=generator) for _ in range(4)]
    attended = torch.ones(2, 3, dtype=torch.bool)
    sizes = [
        float(
            distance(
                [one + scale * other for one, other in zip(before, change, strict=True)],
                before, attended, squared=squared,
            )
        )
        for scale in (1.0, 3.0)
    ]  # fmt: skip
    assert sizes[1] / sizes[0] == pytest.approx(3.0**degree, rel=1e-5)


# Attackers and rows.


def test_attackers_are_the_mixture_that_was_asked_for():
    mixture = Mixture((1e-3, 2e-3, 4e-3), 64, switching=1 / 3, fresh=0.25)
    drawn = [mixture.draw(7, number) for number in range(3000)]
    assert {one.rate for one in drawn} == {1e-3, 2e-3, 4e-3}
    for rate in mixture.rates:
        assert sum(one.rate == rate for one in drawn) / 3000 == pytest.approx(1 / 3, abs=0.04)
    switching = [one.switch for one in drawn if one.switch]
    assert len(switching) / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert sum(switching) / len(switching) / 64 == pytest.approx(2 / 3, abs=0.02)  # the mean of Beta(6, 3)
    assert sum(one.fresh for one in drawn) / 3000 == pytest.approx(1 / 4, abs=0.04)
    assert drawn == [mixture.draw(7, number) for number in range(3000)]
    assert drawn != [mixture.draw(8, number) for number in range(3000)]


def test_an_attacker_that_switches_trains_on_retain_rows_first(monkeypatch):
    method = tar(adversary_switch=1.0, inner_steps=8)
    rows, learned = data(method), []
    learn = adversaries.Attack.learn
    monkeypatch.setattr(
        adversaries.Attack, "learn", lambda self, one: (learned.extend(one), learn(self, one))[1]
    )
    model = adapted()
    found(method, model, rows)
    switch = method.mixture().draw(0, 0, 0).switch
    assert 0 < switch < 8
    wanted = [*rows["attack_retain"][:switch], *rows["attack"][switch:]]
    assert [id(one) for one in learned] == [id(one) for one in wanted]


def test_attackers_never_see_the_prompts_that_resistance_is_measured_on():
    harmful = [Example((prompt, 9, answer), 2) for prompt in range(40) for answer in range(3)]
    rows = {"harmful": harmful, "retain": harmful[:5]}
    streams = TAR(inner_steps=8).streams(rows, 3)
    seen, apart_ = ({row.tokens[:2] for row in streams[name].rows} for name in ("attack", "held_out"))
    assert not seen & apart_
    assert len(apart_) == 8
    assert len(streams["attack"].rows) + len(streams["held_out"].rows) == 120
    assert {name: stream.batches for name, stream in streams.items()} == {
        "attack": 8, "attack_retain": 8, "held_out": 1, "retain": 1,
    }  # fmt: skip
    assert TAR().streams(rows, 4)["held_out"].rows != streams["held_out"].rows
    with pytest.raises(InputError, match=r"1 prompt; 2 or more"):
        TAR().streams({**rows, "harmful": harmful[:3]}, 0)


def test_preferences_take_both_answers_to_a_prompt_and_refuse_without():
    harmful = [Example((prompt, 9, 1), 2) for prompt in range(10)]
    refusals = [Example((prompt, 9, 2), 2) for prompt in range(10)]
    method = TAR(resistance="dpo")
    streams = method.streams({"harmful": harmful, "retain": harmful, "aligned": refusals}, 0)
    pairs = zip(streams["preferred"].rows, streams["held_out"].rows, strict=True)
    assert all(one.tokens[:2] == other.tokens[:2] and one.tokens != other.tokens for one, other in pairs)
    assert streams["preferred"].order == "held_out"
    strange = [Example((90, 9, 2), 2)]
    with pytest.raises(InputError, match="both answers to one prompt"):
        method.streams({"harmful": harmful, "retain": harmful, "aligned": strange}, 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"inner_steps": 10}, "no multiple of --every 4"),
        ({"every": 0}, "every is 0; it must be at least 1"),
        ({"adversary_lr": "fast"}, "numbers of at least 0"),
        ({"adversary_lr": ""}, "numbers of at least 0"),
        ({"adversary_switch": 1.5}, "from 0 to 1"),
        ({"attacks": 2}, "--form tutorial"),
        ({"lam_tr": 0.0, "lam_retain": 0.0}, "nothing would be trained"),
        ({"decay": math.inf}, "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        TAR(**options)


def test_the_equation_says_who_attacks():
    text = TAR(adversary_lora=0.5).equation()
    assert "16 weighted -entropy in attacks of 64 steps" in text
    assert "rates 2e-06, 2e-05, 4e-05, 33% on retain rows first, 50% by a fresh LoRA" in text
