"""MLAC at the shape of its paper's encoder: exact second derivatives through an attacker of BERT."""

import pytest
import torch

from surgery.censor import Censoring, Examples, TwoTasks, bert_tiny, censor
from surgery.censor.training import drawn, harm

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
