"""What must be true of T-Vaccine, whatever its code."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from objectives import adapted, batch, gradients, hooks, model_of, split

from surgery.errors import OutputError, UsageError
from surgery.methods import t_vaccine
from surgery.methods.t_vaccine import TVaccine, draw, probabilities
from surgery.methods.vaccine import Vaccine
from surgery.train import blocks, perturb
from surgery.train.losses import answered_count
from surgery.train.step import Step
from surgery.train.worst_case import output_gradients


def data(*aligned):
    return {"aligned": list(aligned) or [batch(1)], "harmful": [batch(8), batch(9, rows=2)]}


def layer_of(name):
    return int(name.partition(".layers.")[2].partition(".")[0])


def test_probabilities_are_the_shares_of_the_norms_on_harmful_data():
    model, harmful = adapted(), data()["harmful"]
    attention = blocks.find(model).attention
    found = probabilities(model, harmful, attention, Step(0, 1))
    assert min(found) >= 0
    assert math.fsum(found) == pytest.approx(1)
    count = answered_count(harmful, Step(0, 1))
    by_batch = [output_gradients(model, one, attention, count)[1] for one in harmful]
    norms = [
        math.sqrt(sum(float(part.square().sum()) for part in layer)) for layer in zip(*by_batch, strict=True)
    ]
    assert found == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)
    assert max(found) > 1.05 * min(found)  # control: they are not all alike


def test_probabilities_do_not_depend_on_the_scale_of_the_loss():
    model, harmful = adapted(), [batch(8)]
    attention = blocks.find(model).attention
    once = probabilities(model, harmful, attention, Step(0, 1))
    scaled = probabilities(model, harmful, attention, Step(0, 1, summed=lambda tensor: 9 * tensor))
    assert scaled == pytest.approx(once, rel=1e-5)
    assert probabilities(model, [batch(9)], attention, Step(0, 1)) != pytest.approx(once, rel=1e-3)  # control


def test_probabilities_do_not_depend_on_micro_batches():
    model, whole = adapted(), batch(8, rows=4, padding=(4, 0, 2, 6))
    attention = blocks.find(model).attention
    once = probabilities(model, [whole], attention, Step(0, 1))
    assert probabilities(model, split(whole, 1, 3), attention, Step(0, 1)) == pytest.approx(once, rel=1e-5)


def test_without_any_gradient_all_layers_are_equally_likely():
    model = adapted()
    silent = batch(8)
    silent.answered[:] = False
    silent.answered[0, 1] = True
    with torch.no_grad():
        model.get_base_model().lm_head.weight.zero_()
    assert probabilities(model, [silent], blocks.find(model).attention, Step(0, 1)) == [0.25] * 4


def test_a_gradient_that_is_not_finite_is_said():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5] = math.nan
    with pytest.raises(OutputError, match="step 0"):
        TVaccine(gamma=2).backward(model, data(), Step(0, 1))


@pytest.mark.parametrize("gamma", [1, 3, 4])
def test_a_draw_is_of_distinct_layers_and_depends_on_its_key_alone(gamma):
    chances = [0.1, 0.2, 0.3, 0.4]
    draws = [draw(chances, gamma, str(key)) for key in range(50)]
    assert all(len(set(one)) == gamma and one == sorted(one) and set(one) <= set(range(4)) for one in draws)
    assert draws == [draw(chances, gamma, str(key)) for key in range(50)]
    assert gamma == 4 or len({tuple(one) for one in draws}) > 1  # control


def test_a_layer_of_no_chance_is_drawn_only_where_no_other_is_left():
    chances = [0.5, 0.0, 0.5, 0.0]
    assert all(draw(chances, 2, str(key)) == [0, 2] for key in range(50))
    assert draw(chances, 3, "0") == [0, 1, 2]


def chi_square(counts, expected):
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def test_single_draws_are_as_frequent_as_the_probabilities():
    chances, size = [0.15, 0.2, 0.3, 0.35], 4000
    counts = [0] * 4
    for key in range(size):
        counts[draw(chances, 1, str(key))[0]] += 1
    # Three degrees of freedom: 16.27 is passed once in a thousand.
    assert chi_square(counts, [size * chance for chance in chances]) < 16.27
    assert chi_square(counts, [size / 4] * 4) > 100  # control: not uniform


def test_pairs_are_drawn_one_after_the_other_without_replacement():
    chances, size = [0.1, 0.2, 0.3, 0.4], 6000
    counts = {}
    for key in range(size):
        pair = tuple(draw(chances, 2, str(key)))
        counts[pair] = counts.get(pair, 0) + 1
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    chance = [chances[a] * chances[b] * (1 / (1 - chances[a]) + 1 / (1 - chances[b])) for a, b in pairs]
    # Five degrees of freedom: 20.5 is passed once in a thousand.
    assert chi_square([counts.get(pair, 0) for pair in pairs], [size * one for one in chance]) < 20.5


@pytest.mark.parametrize("form", ["paper", "tutorial"])
def test_layers_and_probabilities_are_renewed_when_they_are_due_and_only_then(monkeypatch, form):
    model, drawn, computed = adapted(), [], []

    def watched_draw(chances, size, key):
        drawn.append(int(key.split()[1]))
        return draw(chances, size, key)

    def watched_probabilities(model, batches, attention, step):
        computed.append(step.number)
        return probabilities(model, batches, attention, step)

    monkeypatch.setattr(t_vaccine, "draw", watched_draw)
    monkeypatch.setattr(t_vaccine, "probabilities", watched_probabilities)
    method, memory = TVaccine(gamma=2, redraw_every=3, refresh_every=6, form=form), {}
    for number in range(13):
        method.backward(model, data(), Step(number, 13, seed=4, memory=memory))
    assert computed == [0, 6, 12]
    assert drawn == ([0, 3, 6, 9, 12] if form == "paper" else list(range(13)))


def test_a_resumed_run_goes_on_with_the_layers_it_had():
    model, method = adapted(), TVaccine(gamma=2, redraw_every=4)
    memory = {}
    for number in range(3):
        method.backward(model, data(), Step(number, 8, seed=2, memory=memory))
    kept = copy.deepcopy(memory)
    for number in range(3, 8):
        method.backward(model, data(), Step(number, 8, seed=2, memory=memory))
        method.backward(model, data(), Step(number, 8, seed=2, memory=kept))
        assert kept == memory


def test_only_the_layers_drawn_are_perturbed_and_their_joint_norm_is_rho(monkeypatch):
    model, seen = adapted(), []
    perturbed = perturb.perturbed
    monkeypatch.setattr(perturb, "perturbed", lambda *given: seen.append(given) or perturbed(*given))
    memory = {}
    TVaccine(gamma=2, rho=3.0).backward(model, data(), Step(0, 10, memory=memory))
    [(modules, addends)] = seen
    attention = blocks.find(model).attention
    assert [attention.index(module) for module in modules] == memory["layers"]
    assert math.sqrt(sum(float(part.square().sum()) for part in addends)) == pytest.approx(3, rel=1e-5)
    assert math.sqrt(float(addends[0].square().sum())) < 2.9  # control


def test_only_the_layers_drawn_get_a_gradient():
    model, memory = adapted(), {}
    _, found = gradients(TVaccine(gamma=2), model, data(), Step(0, 10, memory=memory))
    given = {layer_of(name) for name, gradient in found.items() if gradient is not None}
    assert given == set(memory["layers"])
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "lora" in name)


def test_with_all_weights_trained_everything_outside_the_layers_drawn_is_frozen():
    model, memory = model_of(), {}
    _, found = gradients(TVaccine(gamma=1), model, data(), Step(0, 10, memory=memory))
    given = {name for name, gradient in found.items() if gradient is not None}
    assert given == {name for name in found if f".layers.{memory['layers'][0]}." in name}


def trained(model, method, steps, clear):
    """AdamW with weight decay; the weights by name after every step, and the layers drawn."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    memory, history = {}, []
    for number in range(steps):
        optimiser.zero_grad()
        method.backward(model, data(), Step(number, steps, seed=1, memory=memory))
        clear(weights)
        optimiser.step()
        snapshot = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        state = {
            name: {key: value.clone() for key, value in optimiser.state[weight].items()}
            for name, weight in model.named_parameters()
            if weight in optimiser.state
        }
        history.append((list(memory["layers"]), snapshot, state))
    return history


def moved(history):
    """The trained names that a step changed although their layer was not drawn, and those it should have changed."""
    wrong, right = [], []
    for (_, before, states), (layers, after, states_after) in pairwise(history):
        for name in (name for name in after if "lora" in name):
            same = torch.equal(before[name], after[name])
            if name in states:
                same &= all(torch.equal(states[name][key], states_after[name][key]) for key in states[name])
            (right if layer_of(name) in layers else wrong).append(not same)
    return wrong, right


def test_weights_and_optimiser_state_of_frozen_layers_stay_bit_identical():
    wrong, right = moved(trained(adapted(), TVaccine(gamma=1, redraw_every=2), 8, lambda weights: None))
    assert not any(wrong)
    assert all(right)


def test_a_gradient_of_zero_in_place_of_none_would_move_frozen_layers():
    """The control of the test above: weight decay and momentum."""

    def zeros(weights):
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad

    wrong, _ = moved(trained(adapted(), TVaccine(gamma=1, redraw_every=2), 8, zeros))
    assert any(wrong)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_with_all_layers_drawn_it_is_vaccine(dropout):
    model = adapted(dropout=dropout)
    torch.manual_seed(3)
    terms, expected = gradients(Vaccine(rho=3.0), model, data())
    torch.manual_seed(3)
    again, found = gradients(TVaccine(gamma=4), model, data())
    assert again == terms
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, fewer = gradients(TVaccine(gamma=3), model, data())
    assert any(part is None for part in fewer.values())  # control


@pytest.mark.parametrize("first", [0, 2])
def test_nothing_before_the_first_layer_drawn_is_kept_for_the_backward_pass(first):
    model, memory = adapted(), {"probabilities": [0.25] * 4, "layers": [first, 3]}
    model.get_base_model().enable_input_require_grads()
    saved, before = [], []
    handle = blocks.find(model).layers[2].register_forward_pre_hook(lambda *_: before.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(1) or tensor, lambda tensor: tensor
    ):
        TVaccine(gamma=2).backward(model, data(), Step(1, 10, memory=memory))
    handle.remove()
    assert (before[0] == 0) == (first == 2)  # control: from block 0 on there is something


def test_a_step_leaves_no_hooks_behind():
    model = adapted()
    clean = hooks(model)
    TVaccine(gamma=1).backward(model, data(), Step(0, 10))
    assert hooks(model) == clean
    with perturb.without_history(blocks.find(model).layers[1]):
        assert hooks(model) == clean + 1  # control


def test_more_layers_than_the_model_has_are_refused():
    TVaccine(gamma=4).prepare(adapted())
    with pytest.raises(UsageError, match="1 to 4"):
        TVaccine(gamma=5).prepare(adapted())


@pytest.mark.parametrize("wrong", [{"gamma": 0}, {"redraw_every": 0}, {"refresh_every": -1}, {"rho": -1.0}])
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
        TVaccine(**wrong)
