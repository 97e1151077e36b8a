"""What must be true of TAR's gradient and of what its attacks leave, whatever its code."""

import math

import pytest
import torch
from objectives import adapted, apart, batch, hooks, model_of, split
from tar_setup import RATE, data, entropy_gradient, found, tar

from surgery.methods.tar import TAR
from surgery.train import adversaries, perturb
from surgery.train.adversaries import Adversary
from surgery.train.losses import answer_loss, answered_count
from surgery.train.parking import Original, parked
from surgery.train.step import Step, batch_by_batch


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
