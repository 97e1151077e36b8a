"""Censoring an encoder: whose gradient is what, what is drawn, and the attacker that judges it."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from surgery.censor import (
    Censoring,
    Examples,
    Search,
    Settings,
    Toy,
    TwoTasks,
    attack,
    bert_tiny,
    censor,
    mlp,
    search,
)
from surgery.censor.training import drawn, gradients, harm, harmful_loss
from surgery.errors import InputError, OutputError, UsageError
from surgery.train.calibration import calibrated_loss

TOY = Toy(dimensions=5)
RATE = torch.tensor(0.03, dtype=torch.float64)
# At the usual constant a step of Adam is all but the sign of a small gradient, which differences cannot follow.
SETTINGS = Censoring(inner_steps=3, batch_size=9, inner_batch_sizes=(7, 11), inner_eps=1e-2)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(seed=0, classes=2):
    """A small encoder with derivatives of every order, in float64; its heads are large enough to matter."""
    encoder = mlp(5, 6, 1, seed=seed)
    encoder[1] = nn.Tanh()
    model = TwoTasks(encoder.double(), 6, 2, classes, seed=seed)
    with torch.no_grad():
        model.harmful.mul_(4)
    return model


def batches(settings=SETTINGS, seed=0):
    rows = drawn(TOY.draw, settings, source(seed))

    def wide(part):
        return Examples(part.inputs.double(), part.desired, part.harmful)

    return type(rows)(wide(rows.desired), tuple(map(wide, rows.lessons)), wide(rows.held_out))


def start(model):
    return {
        **{f"encoder.{name}": w for name, w in model.encoder.named_parameters()},
        "harmful": model.harmful,
    }


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def directions(model, count=4):
    """Random directions in all that the attack begins with."""
    lengths = [weight.numel() for weight in start(model).values()]
    return torch.randn(count, sum(lengths), generator=source(8), dtype=torch.float64)


def differences(model, rows, settings, size=1e-5):
    """The mean harmful loss differentiated along each direction by central differences."""
    before = [weight.detach().clone() for weight in start(model).values()]
    lengths, found = [weight.numel() for weight in before], []
    for direction in directions(model):
        ends = []
        for sign in (size, -size):
            parts = direction.split(lengths)
            with torch.no_grad():
                for weight, was, part in zip(start(model).values(), before, parts, strict=True):
                    weight.copy_(was + sign * part.view_as(was))
            losses = harm(model, RATE, rows, settings).losses
            ends.append(sum(losses) / len(losses))
        found.append((ends[0] - ends[1]) / (2 * size))
    with torch.no_grad():
        for weight, was in zip(start(model).values(), before, strict=True):
            weight.copy_(was)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("terms", [(0.0, 1.0), (1.0, 0.0), (0.5, 2.0)], ids=["clamped", "calibrated", "both"])
def test_the_exact_meta_gradient_is_that_of_finite_differences_and_the_first_order_one_is_not(terms):
    settings = Censoring(**{**vars(SETTINGS), "calibrated": terms[0], "clamped": terms[1]})
    model, rows = smooth(), batches(settings)
    ours = directions(model) @ flat(harm(model, RATE, rows, settings).gradients.values())
    wanted = differences(model, rows, settings)
    # The recalibration is known to 1e-6 nats, which is what its differences are known by.
    assert (ours - wanted).norm() < (1e-6 if not terms[0] else 2e-3) * wanted.norm()
    first = Censoring(**{**vars(settings), "first_order": True})
    carried = directions(model) @ flat(harm(model, RATE, rows, first).gradients.values())
    assert (carried - wanted).norm() > 0.02 * wanted.norm()


@pytest.mark.parametrize("first_order", [False, True])
def test_the_slope_in_the_rate(first_order):
    settings = Censoring(**{**vars(SETTINGS), "first_order": first_order, "calibrated": 0.0, "clamped": 1.0})
    model, rows = smooth(), batches(settings)
    ends = [harm(model, RATE + step, rows, settings).losses for step in (1e-6, -1e-6)]
    wanted = (sum(ends[0]) - sum(ends[1])) / 3 / 2e-6
    ours = float(harm(model, RATE, rows, settings).slope)
    assert (ours == pytest.approx(wanted, rel=1e-6)) is not first_order
    assert ours == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("first_order", [False, True])
def test_encoder_and_attacker_have_opposite_signs_on_the_harmful_loss(first_order):
    settings = Censoring(**{**vars(SETTINGS), "first_order": first_order})
    model, rows, rate = smooth(), batches(settings), RATE.clone()
    cross_entropy(model(rows.desired.inputs), rows.desired.desired).backward()
    plain = [weight.grad.clone() for weight in model.encoder.parameters()]
    head = model.desired.grad.clone()
    harmful = harm(model, rate, rows, settings)
    gradients(model, rate, rows, settings)
    for (name, weight), own in zip(model.encoder.named_parameters(), plain, strict=True):
        assert torch.allclose(weight.grad - own, -harmful.gradients[f"encoder.{name}"], atol=1e-14)
        assert harmful.gradients[f"encoder.{name}"].any()
    assert torch.equal(model.harmful.grad, harmful.gradients["harmful"])
    assert torch.equal(rate.grad, harmful.slope)
    assert torch.equal(model.desired.grad, head)


@pytest.mark.parametrize("owner", ["encoder", "attacker"])
def test_a_small_step_of_the_encoder_raises_the_harmful_loss_and_one_of_the_attacker_lowers_it(owner):
    model, rows, rate = smooth(), batches(), RATE.clone()
    before = gradients(model, rate, rows, SETTINGS)
    with torch.no_grad():
        moved = [*model.encoder.parameters()] if owner == "encoder" else [model.harmful]
        for weight in moved:
            weight -= 1e-2 * weight.grad
    after = gradients(model, rate, rows, SETTINGS)
    assert (after.harmful > before.harmful) is (owner == "encoder")


@pytest.mark.parametrize("first_order", [False, True])
def test_without_steps_it_is_adversarial_censoring(first_order):
    settings = Censoring(inner_steps=0, batch_size=9, first_order=first_order)
    model, rows, rate = smooth(), batches(settings), RATE.clone()
    gradients(model, rate, rows, settings)
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    outer = rows.held_out
    harmful = calibrated_loss(model.encoder(outer.inputs) @ model.harmful.T, outer.harmful, tolerance=1e-6)
    desired = cross_entropy(model(rows.desired.inputs), rows.desired.desired)
    (desired - harmful).backward()
    for name, weight in model.named_parameters():
        wanted = -weight.grad if name == "harmful" else weight.grad
        assert torch.allclose(found[name], wanted, atol=1e-12)
    assert float(rate.grad) == 0.0
    gradients(model, rate, batches(), SETTINGS)
    assert not torch.allclose(found["harmful"], model.harmful.grad, rtol=0.1)  # control


def test_the_clamped_loss_ends_at_that_of_no_knowledge_and_so_does_its_gradient():
    settings = Censoring(calibrated=0.0, clamped=1.0)
    logits = torch.tensor([[9.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = harmful_loss(logits, torch.tensor([1, 1]), settings)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((math.log(2) + math.log1p(math.exp(-1))) / 2)
    assert not logits.grad[0].any()
    assert logits.grad[1].all()


def test_rows_of_a_step_are_drawn_apart():
    known = TOY.draw(60, source())
    rows = drawn(known.draw, SETTINGS, source(3))
    parts = [rows.desired, rows.held_out, *rows.lessons]
    assert [len(part) for part in parts[:2]] == [9, 9]
    assert {len(part) for part in parts[2:]} <= {7, 11}
    assert len(rows.lessons) == 3
    seen = torch.cat([part.inputs for part in parts])
    assert len(seen.unique(dim=0)) == len(seen)
    with pytest.raises(InputError, match="60"):
        known.draw(61, source())


def trained(seed=0, **changes):
    model = TwoTasks(mlp(5, 8, 2), 8, 2, 2)
    settings = Censoring(**{"steps": 4, "inner_steps": 2, "lr": 1e-2, "batch_size": 8, **changes})
    return model, censor(model, TOY.draw, settings, seed=seed)


def test_a_seed_gives_the_same_again_and_another_one_not():
    state = torch.random.get_rng_state()
    (one, seen), (same, again), (other, _) = trained(), trained(), trained(seed=1)
    assert seen == again
    assert torch.equal(flat(one.parameters()), flat(same.parameters()))
    assert not torch.equal(flat(one.parameters()), flat(other.parameters()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_rate_is_learned_within_its_range():
    _, seen = trained(steps=6, rate=5e-3, meta_lr=1e-2)
    rates = [step.rate for step in seen]
    assert rates[0] == pytest.approx(5e-3)
    assert all(1e-6 * 0.999 <= rate <= 1e-2 * 1.001 for rate in rates)
    assert rates[1] in (pytest.approx(1e-6), pytest.approx(1e-2))
    assert [step.rate for step in trained(meta_lr=0.0)[1]] == pytest.approx([3e-4] * 4)  # control


def test_a_head_drawn_anew_is_another_one_at_each_step():
    fixed, drawn_anew = trained(meta_lr=0.0)[0], trained(meta_lr=0.0, learned_head=False)[0]
    untouched = TwoTasks(mlp(5, 8, 2), 8, 2, 2)
    assert torch.equal(fixed.harmful, untouched.harmful)
    assert not torch.equal(drawn_anew.harmful, untouched.harmful)


def test_a_gradient_that_is_not_finite_stops_it():
    model = TwoTasks(mlp(5, 8, 2), 8, 2, 2)
    with torch.no_grad():
        model.desired[0, 0] = torch.nan
    with pytest.raises(OutputError, match="outer step 0"):
        censor(model, TOY.draw, Censoring(steps=1, inner_steps=1, batch_size=8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"inner_steps": -1},
        {"lr": math.nan},
        {"batch_size": 0},
        {"rate": 0.0},
        {"rate": 1.0},
        {"inner_batch_sizes": ()},
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Censoring(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"trials": 0}, {"rates": (1e-2, 1e-5)}, {"steps": (0, 5)}, {"frozen": ()}], ids=str
)
def test_a_search_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Search(**wrong)


def test_the_toys_tasks_are_two_and_balanced():
    rows = Toy().draw(4000, source())
    assert rows.inputs.shape == (4000, 25)
    for labels in (rows.desired, rows.harmful):
        assert float(labels.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((rows.desired == rows.harmful).float().mean()) == pytest.approx(0.5, abs=0.2)
    assert torch.equal(rows.harmful, Toy().draw(4000, source()).harmful)
    assert not torch.equal(rows.harmful, Toy(seed=1).draw(4000, source()).harmful)


@pytest.fixture(scope="module")
def victim():
    """An encoder without a defence, and examples of its toy."""
    return TwoTasks(mlp(5, 16, 2), 16, 2, 2), TOY.draw(100, source(1)), TOY.draw(1000, source(2))


def test_an_attacker_learns_where_there_is_no_defence_and_writes_nothing(victim):
    model, known, held_out = victim
    before = flat(model.parameters()).clone()
    settings = Settings(rate=1e-2, steps=60, batch_size=24, frozen=False)
    assert attack(model, known, held_out, settings, seed=0) > 0.85
    assert torch.equal(flat(model.parameters()), before)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    idle = Settings(rate=1e-9, steps=1, batch_size=24, frozen=False)
    assert attack(model, known, held_out, idle, seed=0) < 0.75  # control


def test_an_attack_is_that_of_its_seed(victim):
    model, known, held_out = victim
    settings = Settings(rate=3e-3, steps=15, batch_size=12, frozen=False)
    ours = [attack(model, known, held_out, settings, seed=seed) for seed in (0, 0, 1, 2)]
    assert ours[0] == ours[1]
    assert len(set(ours)) > 1


def test_a_frozen_encoder_without_what_is_needed_keeps_an_attacker_from_it(victim):
    _, known, held_out = victim
    encoder = mlp(5, 16, 2)
    with torch.no_grad():
        encoder[0].weight.zero_()
    model = TwoTasks(encoder, 16, 2, 2)
    frozen, free = (
        attack(model, known, held_out, Settings(1e-2, 80, 24, frozen), seed=0) for frozen in (True, False)
    )
    assert frozen < 0.6 < 0.8 < free


def test_the_search_keeps_the_worst_case_and_runs_it_again(victim):
    model, known, held_out = victim
    space = Search(trials=12, runs=3, steps=(2, 25))
    found = search(model, known, held_out, space, tested=TOY.draw(500, source(5)), seed=4)
    assert found.examples == 100
    assert found.best.accuracy == max(trial.accuracy for trial in found.trials) > 0.7
    assert found.best.accuracy > min(trial.accuracy for trial in found.trials) + 0.1
    assert len(found.accuracies) == 3
    assert found.accuracy == pytest.approx(sum(found.accuracies) / 3)
    assert found == search(model, known, held_out, space, tested=TOY.draw(500, source(5)), seed=4)
    for trial in found.trials:
        settings = trial.settings
        assert 1e-5 <= settings.rate <= 1e-2
        assert 2 <= settings.steps <= 25
        assert settings.batch_size in (12, 24, 48)
    assert {trial.settings.frozen for trial in found.trials} == {True, False}


def test_the_search_ends_when_nothing_gets_better(victim):
    model, known, held_out = victim
    # At one step of next to no length all trials are as good as their heads.
    space = Search(trials=40, patience=3, runs=1, steps=(1, 1), rates=(1e-9, 1e-9))
    trials = search(model, known, held_out, space).trials
    best = max(range(len(trials)), key=lambda number: trials[number].accuracy)
    assert len(trials) == best + 4 < 40


def test_without_optuna_the_search_says_what_to_install(victim, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    model, known, held_out = victim
    with pytest.raises(UsageError, match=r"pip install \"model-surgery\[study\]\""):
        search(model, known, held_out, Search())


def test_bert_tiny_has_the_papers_shape_and_ignores_padding():
    encoder = bert_tiny(90, 16).eval()
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    assert shapes["bert.encoder.layer.1.intermediate.dense.weight"] == (512, 128)
    assert shapes["bert.pooler.dense.weight"] == (128, 128)
    assert not any(".layer.2." in name for name in shapes)
    tokens = torch.randint(1, 90, (3, 7), generator=source())
    padded = torch.cat([tokens, torch.zeros(3, 2, dtype=torch.long)], 1)
    assert torch.allclose(encoder(tokens), encoder(padded), atol=1e-6)
    assert encoder(tokens).shape == (3, 128)
    assert torch.equal(encoder(tokens), bert_tiny(90, 16).eval()(tokens))
    assert not torch.equal(encoder(tokens), bert_tiny(90, 16, seed=1).eval()(tokens))
