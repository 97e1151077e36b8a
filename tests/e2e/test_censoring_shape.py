"""MLAC in its paper's setting: exact derivatives through an attacker of BERT; what more inner steps are for."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from surgery.censor import Censoring, Examples, Toy, TwoTasks, bert_tiny, censor, mlp
from surgery.censor.training import drawn, harm, harmful_logits
from surgery.train.unrolled import Adam, trajectory

pytestmark = pytest.mark.slow

SETTINGS = Censoring(steps=3, inner_steps=4, batch_size=8, inner_batch_sizes=(12,), rate=1e-3, lr=1e-4)


def draw(count, source):
    tokens = torch.randint(1, 100, (count, 12), generator=source)
    return Examples(tokens, (tokens[:, 0] > 50).long(), (tokens[:, 1] > 50).long())


def model():
    return TwoTasks(bert_tiny(100, 16, dropout=0.0), 128, 2, 2)


def test_second_derivatives_of_bert_are_finite_and_not_those_of_first_order():
    torch.set_num_threads(1)
    rows, rate = drawn(draw, SETTINGS, torch.Generator().manual_seed(0)), torch.tensor(1e-3)
    first = Censoring(**{**vars(SETTINGS), "first_order": True})
    found = [harm(model(), rate, rows, settings) for settings in (SETTINGS, SETTINGS, first)]
    exact, again, carried = (
        torch.cat([part.flatten() for part in one.gradients.values()]).double() for one in found
    )
    assert exact.isfinite().all()
    assert torch.equal(exact, again)
    assert found[0].losses == pytest.approx(found[2].losses, abs=1e-5)
    assert (exact - carried).norm() > 0.05 * carried.norm()


def test_a_few_steps_on_bert_move_encoder_and_attacker():
    torch.set_num_threads(1)
    ours, before = model(), model()
    seen = censor(ours, draw, SETTINGS)
    assert all(0 <= step.harmful <= 0.6932 for step in seen)
    assert len({step.rate for step in seen}) == 3
    for name, weight in ours.named_parameters():
        assert weight.isfinite().all(), name
    assert not torch.equal(ours.harmful, before.harmful)
    assert not torch.equal(ours.encoder.bert.pooler.dense.weight, before.encoder.bert.pooler.dense.weight)


def accuracies(model, toy, rate, seed, steps=64):
    """Of the harmful task on points of its own, after each step of an attacker with new points for every one."""
    source, test = torch.Generator().manual_seed(seed), toy.draw(4000, torch.Generator().manual_seed(99))
    start = {f"encoder.{name}": weight for name, weight in model.encoder.named_parameters()}
    start["harmful"] = model.harmful

    def learn(weights, number):
        lesson = toy.draw(48, source)
        return cross_entropy(harmful_logits(model, weights, lesson.inputs), lesson.harmful)

    for weights in trajectory(learn, start, steps, Adam(), rate, exact=False, clip=100.0):
        with torch.no_grad():
            guesses = harmful_logits(model, weights, test.inputs).argmax(1)
        yield float((guesses == test.harmful).double().mean())


def steps_needed(model, toy):
    """Steps to 80 per cent, of the best of three rates within the paper's range, on average over three attackers."""

    def needed(rate):
        runs = [list(accuracies(model, toy, rate, seed)) for seed in (1, 2, 3)]
        means = [sum(each) / 3 for each in zip(*runs, strict=True)]
        return next((number for number, mean in enumerate(means, 1) if mean >= 0.8), 65)

    return min(needed(rate) for rate in (1e-3, 3e-3, 1e-2))


@pytest.mark.nightly
def test_on_the_toy_an_attacker_needs_more_steps_the_more_inner_steps_there_were():
    torch.set_num_threads(1)
    needed, good = {0: [], 4: [], 16: []}, {0: [], 4: [], 16: []}
    for seed in (0, 1, 2):
        toy = Toy(seed=seed)
        test = toy.draw(4000, torch.Generator().manual_seed(99))
        for inner in needed:
            ours = TwoTasks(mlp(seed=seed), 50, 2, 2, seed=seed)
            settings = Censoring(
                steps=300, lr=3e-3, batch_size=100, rate=1e-2, inner_batch_sizes=(48,), inner_steps=inner
            )
            censor(ours, toy.draw, settings, seed=seed)
            with torch.no_grad():
                right = ours(test.inputs).argmax(1) == test.desired
            good[inner].append(float(right.double().mean()))
            needed[inner].append(steps_needed(ours, toy))
    assert all(one > other for one, other in zip(needed[16], needed[0], strict=True)), needed
    assert sum(needed[0]) < sum(needed[4]) < sum(needed[16]), needed
    assert sum(needed[16]) > 1.4 * sum(needed[0]), needed
    assert min(good[16]) > 0.96, good  # what is desired is kept
