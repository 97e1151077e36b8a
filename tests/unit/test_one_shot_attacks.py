"""Attacks without training: one look in the attacked state, nothing left of it, and what they state about weights."""

import hashlib

import pytest
import torch

from surgery import attacks
from surgery.attacking import trials
from surgery.attacking.ground import prepare
from surgery.attacking.settings import Budget
from surgery.attacks import refusal_ablation
from surgery.attacks.base import PLAIN
from surgery.attacks.hypothetical import Hypothetical
from surgery.attacks.prefill import Prefill
from surgery.attacks.quantise import Quantise, rounded
from surgery.attacks.refusal_ablation import RefusalAblation, ablate, writing
from surgery.attacks.reverse_lox import ReverseLox, subtract
from surgery.attacks.steering import Steering
from surgery.errors import InputError, UsageError
from surgery.spectral import truncated_svd
from surgery.train import blocks, perturb

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_SHOT = [name for name in attacks.names() if not attacks.get(name).trains]


@pytest.fixture(scope="module")
def ground():
    return prepare("demo:aligned", {}, Budget(limit=32, max_new_tokens=40), base="demo:base", device="cpu")


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return digest.hexdigest(), hooks, model.training


@pytest.mark.parametrize("name", ONE_SHOT)
def test_one_look_and_the_model_is_what_it_was(ground, name):
    before, looks = fingerprint(ground.target.model), []
    attacks.get(name)().carry_out(ground.target, lambda steps, approach: looks.append((steps, approach)))
    assert fingerprint(ground.target.model) == before
    assert [steps for steps, _ in looks] == [0]


def test_of_many_blocks_few_rows_choose_those_that_all_rows_compare(ground, monkeypatch):
    few, every = [5, 1, 4, 2, 3, 0], [0.0, 3.0, 2.0, 1.0, 4.0, 5.0]
    asked, rows = [], RefusalAblation(rows=12)._examples(ground.target, "harmful")

    def loss(target, writers, direction, rows):
        asked.append(len(rows))
        return (few if len(rows) == 2 else every)[int(direction)]

    def best(blocks):
        asked.clear()
        return refusal_ablation._best(ground.target, [], list(torch.arange(blocks)), rows)

    monkeypatch.setattr(refusal_ablation, "_loss", loss)
    monkeypatch.setattr(refusal_ablation, "FIRST_ROWS", 2)
    monkeypatch.setattr(refusal_ablation, "FINALISTS", 3)
    # Block 0 would be the best on all rows, and the few rows leave it out; of 5, 1 and 3 the best is 3.
    assert best(6) == 3
    assert asked == [2] * 6 + [12] * 3
    assert best(3) == 0
    assert asked == [12] * 3


@pytest.mark.parametrize("name", ONE_SHOT)
def test_the_model_is_restored_when_looking_fails(ground, name):
    before = fingerprint(ground.target.model)

    def watch(steps, approach):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        attacks.get(name)().carry_out(ground.target, watch)
    assert fingerprint(ground.target.model) == before


@pytest.mark.parametrize("name", ["quantise", "refusal-ablation", "reverse-lox"])
def test_weights_are_other_ones_while_one_looks(ground, name):
    before, during = fingerprint(ground.target.model), []
    attacks.get(name)().carry_out(ground.target, lambda *_: during.append(fingerprint(ground.target.model)))
    assert during[0] != before


def rate(ground, attack):
    return trials.run(attack, ground)["points"][0]["asr"]["value"]


def test_the_direction_of_refusal_and_the_update_in_reverse_undo_alignment(ground):
    assert rate(ground, attacks.get("no-attack")()) == 0
    assert rate(ground, RefusalAblation()) > 0.5
    assert rate(ground, ReverseLox()) > 0.5


def test_steering_makes_compliant_answers_likelier(ground):
    plain, steered = (
        trials.run(attack, ground)["points"][0]["harmful_loss"]["value"]
        for attack in (attacks.get("no-attack")(), Steering())
    )
    assert steered < 0.8 * plain


def test_nothing_writes_along_an_ablated_direction(ground):
    model = ground.target.model
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    direction /= direction.norm()
    example = ground.probe.harmful[0]
    writers = writing(model, example)
    parts = 1 + 2 * len(blocks.find(model).layers)
    assert len(writers) == parts

    def along():
        return [
            float((direction @ weight.detach().double().movedim(axis, 0).reshape(len(direction), -1)).norm())
            / float(weight.detach().norm())
            for weight, axis in writers
        ]

    assert min(along()) > 1e-3  # the control
    with perturb.restored([weight for weight, _ in writers]):
        ablate(writers, direction.float())
        assert max(along()) < 1e-6
        with torch.no_grad():
            states = model(torch.tensor([example.tokens]), output_hidden_states=True).hidden_states
        # Of the residual stream itself; the last entry has gone through the final norm.
        for state in states[:-1]:
            assert float((state.double() @ direction).abs().max()) < 1e-4 * float(state.norm())


def test_rounding_moves_a_weight_by_half_a_step_at_most():
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for bits in (4, 8):
        found = rounded(weight, bits, 16)
        for begin in range(0, 50, 16):
            own, new = weight[:, begin : begin + 16], found[:, begin : begin + 16]
            step = own.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert bool(((new - own).abs() <= step / 2 * (1 + 1e-12)).all())
            assert len((new[0] / step[0]).round().unique()) <= 2**bits
        errors.append(float((found - weight).norm()))
    assert errors[1] < errors[0] / 10
    assert float((rounded(weight, 4, 0) - weight).norm()) > errors[0]
    assert bool((rounded(torch.zeros(2, 3), 4, 0) == 0).all())


def test_the_update_in_reverse_undoes_lox():
    """W = A + alpha P_k(A - B) of an update of rank k goes back to A, and with 1 + alpha to B."""
    source = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=source, dtype=torch.float64)
    update = torch.randn(20, 2, generator=source, dtype=torch.float64) @ torch.randn(
        2, 30, generator=source, dtype=torch.float64
    )
    aligned = base + update
    weight = torch.nn.Parameter(aligned + 1.5 * update)
    factors = truncated_svd(weight.detach() - base, 2, seed=0, name="w", method="exact").factors
    # The whole difference is 2.5 updates: 0.6 of it is what LoX added.
    subtract({"w": weight}, {"w": factors}, 0.6)
    torch.testing.assert_close(weight.detach(), aligned, rtol=0, atol=1e-10)
    subtract({"w": weight}, {"w": factors}, 0.4)
    torch.testing.assert_close(weight.detach(), base, rtol=0, atol=1e-10)


def test_how_a_model_is_asked(ground):
    looks = []
    Prefill(prefix="Sure:").carry_out(ground.target, lambda _, approach: looks.append(approach))
    Hypothetical(frame="Once: {} The end.").carry_out(
        ground.target, lambda _, approach: looks.append(approach)
    )
    assert looks[0].prefix == "Sure:"
    assert looks[1].ask("Do it.") == "Once: Do it. The end."
    assert looks[1].prefix == PLAIN.prefix


def test_an_attacker_without_what_an_attack_needs_is_told(ground):
    for attack, missing in ((ReverseLox(), "before alignment"), (RefusalAblation(), "benign")):
        target = ground.target
        poor = type(target)(target.model, target.tokenizer, {"harmful": target.data["harmful"]})
        with pytest.raises(InputError, match=missing):
            attack.carry_out(poor, lambda *_: None)


@pytest.mark.parametrize(
    ("attack", "given"),
    [
        (Prefill, {"prefix": " "}),
        (Hypothetical, {"frame": "no place"}),
        (Quantise, {"block": -1}),
        (RefusalAblation, {"rows": 0}),
        (ReverseLox, {"alphas": "0"}),
        (ReverseLox, {"alphas": "much"}),
        (Steering, {"strengths": "much"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(attack, given):
    with pytest.raises(UsageError, match=next(iter(given))):
        attack(**given)
