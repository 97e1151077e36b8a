"""What must be true of TAR's losses, attackers and rows, whatever its code."""

import math

import pytest
import torch
from objectives import adapted, apart, batch, flat, gradients, model_of
from tar_setup import data, entropy_gradient, found, step_of, tar

from surgery.errors import InputError, UsageError
from surgery.methods.tar import TAR
from surgery.train import adversaries
from surgery.train.adversaries import Mixture
from surgery.train.parking import Original
from surgery.train.resistance import minus_entropy, preference
from surgery.train.sft import SFT
from surgery.train.states import distance
from surgery.train.step import Step
from surgery.train.tokens import Example


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
