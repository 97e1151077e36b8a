"""What must be true of Circuit Breakers, whatever its code."""

import math

import pytest
import torch
from objectives import adapted, apart, batch, gradients, hooks, model_of, split, widened

from surgery.errors import InputError, UsageError
from surgery.methods import circuit_breakers
from surgery.methods.circuit_breakers import (
    CircuitBreakers,
    distance,
    hidden_states,
    leave_the_start,
    rerouting,
)
from surgery.train import blocks
from surgery.train.step import Step

STILL = CircuitBreakers(start=0.0)


def data(harmful=None, retain=None):
    return {"harmful": harmful or [batch(1)], "retain": retain or [batch(2, rows=2)]}


def states(seed, *, count=3, rows=2, length=5, width=6):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, width, generator=source) for _ in range(count)]


ALL = torch.ones(2, 5, dtype=torch.bool)


def test_at_the_start_of_an_adapter_the_cosine_is_one_and_the_distance_nothing():
    terms, found = gradients(STILL, adapted(spread=0), data())
    assert terms["rerouting"] == pytest.approx(1, abs=1e-6)
    assert terms["retain"] == 0
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    terms, _ = gradients(STILL, adapted(spread=0.5), data())
    assert terms["rerouting"] < 0.99  # control
    assert terms["retain"] > 0.1


@pytest.mark.parametrize("squared", [False, True])
def test_the_distance_has_gradient_zero_at_zero_and_not_nan(squared):
    now = [state.requires_grad_() for state in states(1)]
    distance(now, [state.detach().clone() for state in now], ALL, squared=squared).backward()
    assert all(torch.equal(state.grad, torch.zeros_like(state)) for state in now)
    difference = torch.zeros(3, requires_grad=True)
    difference.square().sum().sqrt().backward()
    assert difference.grad.isnan().all()  # control: the root of a sum of squares


def test_orthogonal_and_opposed_states_have_no_loss_and_no_gradient():
    before = [torch.zeros(2, 5, 6)]
    before[0][..., 0] = 1
    now = torch.zeros(2, 5, 6)
    now[0, :, 1] = 2.0
    now[1, :, 0] = -3.0
    now.requires_grad_()
    loss = rerouting([now], before, ALL, [0])
    loss.backward()
    assert float(loss.detach()) == 0
    assert not now.grad.any()
    slanted = now.detach() + before[0] * 4
    assert float(rerouting([slanted], before, ALL, [0])) > 0  # control


def test_only_tokens_that_still_point_the_old_way_are_turned():
    before, [now] = states(1, count=1), states(2, count=1)
    now.requires_grad_()
    rerouting([now], before, ALL, [0]).backward()
    turned = torch.linalg.vector_norm(now.grad, dim=-1) > 0
    assert torch.equal(turned, torch.cosine_similarity(now, before[0], dim=-1) > 0)
    assert turned.any()  # control: both kinds are there
    assert not turned.all()


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_rerouting_depends_on_directions_of_the_counted_tokens_alone(scale):
    now, before = states(1), states(2)
    some = ALL.clone()
    some[0, 3:] = False
    expected = float(rerouting(now, before, some, [0, 2]))
    assert float(rerouting([scale * one for one in now], before, some, [0, 2])) == pytest.approx(
        expected, rel=1e-5
    )
    assert float(rerouting(now, [scale * one for one in before], some, [0, 2])) == pytest.approx(
        expected, rel=1e-5
    )
    for state in now + before:
        state[0, 3:] = math.nan
    assert float(rerouting(now, before, some, [0, 2])) == pytest.approx(expected)
    now[0][0, 0] *= -1
    assert float(rerouting(now, before, some, [0, 2])) != pytest.approx(expected)  # control


def test_the_distance_is_of_degree_one_and_the_tutorials_of_degree_two():
    before, away = states(1), states(2)
    once, twice = ([b + factor * a for a, b in zip(away, before, strict=True)] for factor in (1, 2))
    ratio = {
        squared: float(
            distance(twice, before, ALL, squared=squared) / distance(once, before, ALL, squared=squared)
        )
        for squared in (False, True)
    }
    assert ratio[False] == pytest.approx(2, rel=1e-5)
    assert ratio[True] == pytest.approx(4, rel=1e-5)  # control: the squared form is told apart


@pytest.mark.parametrize("squared", [False, True])
def test_a_relative_distance_does_not_change_with_the_size_of_hidden_states(squared):
    now, before = states(1), states(2)

    def both(size, relative):
        large = ([size * state for state in which] for which in (now, before))
        return float(distance(*large, ALL, squared=squared, relative=relative))

    assert both(200.0, relative=True) == pytest.approx(both(1.0, relative=True), rel=1e-5)
    assert both(200.0, relative=False) > 100 * both(1.0, relative=False)  # control
    ours, theirs = (torch.stack(which).double() for which in (now, before))
    shares = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    expected = (shares**2 if squared else shares).sum() / len(now)
    assert both(1.0, relative=True) == pytest.approx(float(expected), rel=1e-5)


def test_a_relative_distance_from_a_state_of_norm_zero_is_the_distance_itself():
    now = [state.requires_grad_() for state in states(1)]
    before = [torch.zeros_like(state) for state in now]
    found = distance(now, before, ALL, squared=False, relative=True)
    assert torch.allclose(found, distance(now, before, ALL, squared=False))
    found.backward()
    assert all(state.grad.isfinite().all() for state in now)


def test_the_relative_form_turns_a_model_whose_states_are_large_and_the_papers_does_not():
    """Embeddings and what blocks add, times 500: no cosine changes, and every distance grows as much."""

    def turned(form):
        model = adapted(spread=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(
                    ("embed_tokens.weight", "o_proj.base_layer.weight", "down_proj.base_layer.weight")
                ):
                    weight.mul_(500)
        method = CircuitBreakers(form=form, targets="2")
        optimiser = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=5e-3)
        for number in range(40):
            optimiser.zero_grad()
            terms = method.backward(model, data(), Step(number, 40))
            optimiser.step()
        return terms["rerouting"]

    assert turned("relative") < 0.5
    assert turned("paper") > 0.9


def test_the_distance_is_the_mean_over_layers_of_the_sum_over_tokens():
    now, before = states(1), states(2)
    some = ALL.clone()
    some[1, 2:] = False
    expected = sum(
        float(torch.dist(ours[at], theirs[at]))
        for ours, theirs in zip(now, before, strict=True)
        for at in some.nonzero(as_tuple=False).unbind()
        for at in [tuple(at.tolist())]
    )
    assert float(distance(now, before, some, squared=False)) == pytest.approx(expected / 3, rel=1e-5)


def test_coefficients_add_up_to_alpha_and_end_at_a_half_each():
    method = CircuitBreakers(alpha=8.0)
    for step in range(1, 151):
        rerouted, retained = method.coefficients(step / 150)
        assert rerouted + retained == pytest.approx(8)
        assert rerouted == pytest.approx(8 * (1 - step / 300))
    assert method.coefficients(1.0) == pytest.approx((4, 4))
    assert CircuitBreakers(alpha=8.0, form="tutorial").coefficients(1.0) == pytest.approx((0, 8))  # control


@pytest.mark.parametrize(("number", "share"), [(0, 0.05), (9, 0.5)])
def test_the_coefficients_go_with_the_steps_of_the_run(number, share):
    model = adapted()
    terms = STILL.backward(model, data(), Step(number, 10))
    assert terms["retain_share"] == pytest.approx(share)
    assert terms["loss"] == pytest.approx(10 * ((1 - share) * terms["rerouting"] + share * terms["retain"]))


@pytest.mark.parametrize(
    ("depth", "targets"), [(32, [10, 20]), (4, [1, 3]), (30, [9, 19]), (2, [1]), (1, [1]), (80, [25, 50])]
)
def test_targets_stand_at_the_papers_depths(depth, targets):
    method = CircuitBreakers()
    assert method.targets_of(depth) == targets
    assert method.layers(depth) == range(min(depth, targets[-1] + 1))
    assert CircuitBreakers(targets="1").layers(depth) == range(min(depth, 2))


def test_the_gradient_is_that_of_the_two_terms_computed_another_way():
    """All hidden states as transformers gives them, the cosine from torch, one backward pass."""
    model, one, kept = adapted(layers=range(3)), batch(1), batch(2, rows=2)
    method = CircuitBreakers(start=0.0, targets="1,2", alpha=3.0)
    terms, found = gradients(method, model, data([one], [kept]), Step(4, 10))

    def all_states(of):
        return model(input_ids=of.tokens, attention_mask=of.attended, output_hidden_states=True).hidden_states

    def old_states(of):
        with torch.no_grad(), model.disable_adapter():
            return all_states(of)

    decoder = blocks.find(model).stack
    decoder.layers = decoder.layers[:3]
    now, before = all_states(one), old_states(one)
    cosines = [torch.cosine_similarity(now[at], before[at], dim=-1)[one.attended] for at in (1, 2)]
    turned = torch.stack(cosines).relu().mean()
    now, before = all_states(kept), old_states(kept)
    moved = torch.stack(
        [(ours - theirs)[kept.attended].norm(dim=-1) for ours, theirs in zip(now, before, strict=True)]
    )
    (3 * (0.75 * turned + 0.25 * moved.mean())).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert terms["rerouting"] == pytest.approx(turned.item(), rel=1e-5)
    assert terms["retain"] == pytest.approx(moved.mean().item(), rel=1e-5)
    assert len(now) == 4
    assert apart(found, expected) < 1e-4


def test_only_blocks_up_to_the_last_target_take_part():
    model = adapted(layers=CircuitBreakers(targets="1").layers(4))
    calls = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(blocks.find(model).layers)
    ]
    CircuitBreakers(targets="1").backward(model, data(), Step(0, 10))
    for handle in handles:
        handle.remove()
    assert set(calls) == {0, 1}
    assert len(blocks.find(model).layers) == 4  # put together again
    named = {name for name, _ in model.named_parameters() if "lora" in name}
    assert not any(".layers.2." in name or ".layers.3." in name for name in named)


def test_the_model_is_whole_again_after_a_step_that_fails():
    model = adapted()
    clean = hooks(model)

    def refuse(loss):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        CircuitBreakers(targets="1").backward(model, data(), Step(0, 10, backward=refuse))
    assert len(blocks.find(model).layers) == 4
    assert hooks(model) == clean
    assert model.training
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "lora" in name)


def test_the_other_adapter_state_is_kept_in_training_mode():
    model = adapted(dropout=0.5)
    first = gradients(STILL, model, data(), Step(3, 10))[0]
    assert gradients(STILL, model, data(), Step(3, 10))[0] != first  # dropout is on in what is trained
    still = adapted(dropout=0.0)
    assert gradients(STILL, still, data(), Step(3, 10))[0] == gradients(STILL, still, data(), Step(3, 10))[0]


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)], ids=str)
def test_micro_batches_and_padding_do_not_change_the_gradient(sizes):
    model, whole, kept = (
        adapted(),
        batch(1, rows=4, padding=(4, 0, 2, 6)),
        batch(2, rows=4, padding=(1, 5, 0, 0)),
    )
    terms, expected = gradients(STILL, model, data([whole], [kept]))
    parts = data([widened(part, 3) for part in split(whole, *sizes)], split(kept, *sizes))
    split_terms, found = gradients(STILL, model, parts)
    assert split_terms == pytest.approx(terms, rel=1e-5)
    assert apart(found, expected) < 1e-4
    single = gradients(STILL, model, data([parts["harmful"][0]], [kept]))[0]
    assert single["rerouting"] != pytest.approx(terms["rerouting"], rel=1e-5)  # control


def test_the_noise_at_the_start_is_that_of_the_seed_and_is_given_once():
    ones = [adapted(spread=0) for _ in range(3)]
    for model, seed in zip(ones, (5, 5, 6), strict=True):
        leave_the_start(model, 1e-3, seed)
    first, same, other = (
        {name: w for name, w in model.named_parameters() if "lora_B" in name} for model in ones
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    values = torch.cat([weight.detach().flatten() for weight in first.values()])
    assert float(values.std()) == pytest.approx(1e-3, rel=0.05)
    before = {name: weight.detach().clone() for name, weight in first.items()}
    leave_the_start(ones[0], 1e-3, 7)  # an adapter that has left it already
    assert all(torch.equal(first[name], before[name]) for name in first)


def test_without_noise_bfloat16_would_never_start():
    model = adapted(spread=0, dtype=torch.bfloat16)
    found = gradients(STILL, model, data(), Step(0, 1000))[1]
    still = max(float(gradient.abs().max()) for gradient in found.values() if gradient is not None)
    found = gradients(CircuitBreakers(start=1e-2), model, data(), Step(0, 1000))[1]
    started = max(float(gradient.abs().max()) for gradient in found.values() if gradient is not None)
    assert started > 100 * still


def trained(method, steps, *, seed=0, rate=5e-3):
    """A tiny model after training, its terms at every step, its weights before, and its logits before and off."""
    model = adapted(spread=0, layers=method.layers(4), rank=8, seed=seed)
    one = batch(1)
    with torch.no_grad():
        logits = model(input_ids=one.tokens).logits
    base = {name: weight.clone() for name, weight in model.named_parameters() if "lora" not in name}
    optimiser = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=rate)
    history = []
    for number in range(steps):
        optimiser.zero_grad()
        history.append(method.backward(model, data(), Step(number, steps, seed=seed)))
        optimiser.step()
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=one.tokens).logits
    return model, history, base, logits, off


def test_rerouting_falls_below_a_third_while_what_is_retained_stays_bounded():
    model, history, base, logits, off = trained(CircuitBreakers(), 60)
    assert history[0]["rerouting"] > 0.99
    assert min(terms["rerouting"] for terms in history) < 0.3
    assert history[-1]["rerouting"] < 0.3
    peak = max(terms["retain"] for terms in history)
    assert history[-1]["retain"] < 0.8 * peak  # it comes back as its coefficient grows
    now = dict(model.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in base.items())
    assert torch.equal(logits, off)


def test_without_the_rerouting_term_nothing_is_rerouted(monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(CircuitBreakers, "coefficients", lambda self, done: (0.0, 10 * done / 2))
    _, history, *_ = trained(CircuitBreakers(), 60)
    assert history[-1]["rerouting"] > 0.99


@pytest.mark.parametrize(
    ("form", "rerouting", "retain", "advice"),
    [
        ("paper", 0.99, 40.0, "--form relative"),
        ("paper", 0.99, 2.0, "--steps"),
        ("relative", 0.99, 40.0, "--steps"),
        ("tutorial", 0.99, 40.0, "--steps"),
        ("tutorial", 0.99, 400.0, "--form relative"),
        ("paper", 0.9, 40.0, None),
    ],
)
def test_a_run_that_has_rerouted_nothing_says_so(form, rerouting, retain, advice):
    signs = CircuitBreakers(form=form).signs({}, {"rerouting": rerouting, "retain": retain})
    assert len(signs) == (advice is not None)
    assert all("0.99" in sign and advice in sign for sign in signs)


def test_a_step_leaves_no_hooks_behind():
    model = adapted()
    clean = hooks(model)
    CircuitBreakers().backward(model, data(), Step(0, 10))
    assert hooks(model) == clean


def test_hidden_states_are_those_that_transformers_counts():
    model, one = adapted(), batch(1)
    with torch.no_grad():
        expected = model(
            input_ids=one.tokens, attention_mask=one.attended, output_hidden_states=True
        ).hidden_states
        found = hidden_states(model, blocks.find(model), one)
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[one.attended], theirs[one.attended])


def test_what_cannot_be_trained_is_refused():
    CircuitBreakers().prepare(adapted())
    with pytest.raises(UsageError, match="leave out --full"):
        CircuitBreakers().prepare(model_of())
    with pytest.raises(UsageError, match="name 1 to 4"):
        CircuitBreakers(targets="5").prepare(adapted())
    for wrong in ("0", "1,", "x", "-1"):
        with pytest.raises(UsageError, match="targets"):
            CircuitBreakers(targets=wrong)
    for wrong in ({"alpha": 0.0}, {"alpha": math.nan}, {"start": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CircuitBreakers(**wrong)


def test_a_decoder_without_a_final_norm_is_refused():
    model = adapted()
    del blocks.find(model).stack.norm
    with pytest.raises(InputError, match="norm"):
        circuit_breakers.CircuitBreakers().prepare(model)
