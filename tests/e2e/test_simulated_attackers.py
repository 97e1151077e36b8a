"""Booster and TAR on the embedded pair under an attack by fine-tuning, and what is left of it without their term."""

import pytest
import torch
from small_scale import Laboratory

from surgery.methods import booster
from surgery.methods.booster import Booster
from surgery.methods.tar import TAR
from surgery.train.presets import from_preset

pytestmark = pytest.mark.slow

ALIGNING = {"steps": 60, "weight_decay": 0.0}
# Of the attack, at which the harmful loss is looked at.
STEPS = (0, 10, 20, 40, 160)


@pytest.fixture(scope="module")
def laboratory():
    torch.set_num_threads(1)
    return Laboratory()


def under_attack(laboratory, model, steps):
    """The harmful loss after each number of steps of an attacker."""
    return {
        count: laboratory.loss(laboratory.attacked(model, count) if count else model, "harmful")
        for count in steps
    }


@pytest.fixture(scope="module")
def plain(laboratory):
    """Booster switched off: plain training on aligned rows."""
    return laboratory.trained(Booster(lam=0.0), **ALIGNING)[0]


def test_after_booster_an_attack_gains_less_at_first(laboratory, plain):
    model, _ = laboratory.trained(Booster(), **ALIGNING)
    ours, theirs = (under_attack(laboratory, one, (0, 5, 10)) for one in (model, plain))
    assert ours[0] == pytest.approx(theirs[0], rel=0.2)
    assert ours[10] > 2 * theirs[10]
    assert ours[0] - ours[5] < 0.7 * (theirs[0] - theirs[5])
    assert laboratory.loss(model, "benign") < laboratory.loss(plain, "benign") + 0.05


def test_without_its_last_term_booster_teaches_harm_at_once(laboratory, plain, monkeypatch):
    def without(weights, descend, alpha, step):
        before = step.summed(descend())
        own = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        for weight in weights:
            weight.grad = None
        return own, float(before), 0.0

    monkeypatch.setattr(booster, "attenuated", without)
    model, _ = laboratory.trained(Booster(), **ALIGNING)
    assert laboratory.loss(model, "harmful") < 0.1 * laboratory.loss(plain, "harmful")


@pytest.fixture(scope="module")
def resistant(laboratory):
    """By TAR with its preset, all weights trained."""
    method, _ = from_preset(TAR, "small", {"full": True})
    return laboratory.trained(method, full=True)


@pytest.mark.nightly
def test_tar_resists_an_attack_longer_than_entropy_alone(laboratory, resistant):
    model, history = resistant
    whole, _ = from_preset(TAR, "small", {"full": True})
    # K = 0 with the weight that all measurements of an attack have together.
    weight = whole.lam_tr * sum(whole.weights().values())
    alone, _ = laboratory.trained(TAR(inner_steps=0, lam_tr=weight), full=True)
    ours, theirs = (under_attack(laboratory, one, STEPS) for one in (model, alone))
    assert ours[40] > 2 * theirs[40]
    assert theirs[20] > 10 * under_attack(laboratory, laboratory.model(), (20,))[20]
    assert ours[160] < 0.1 * ours[0]  # a long attack breaks it
    assert history[-1]["resistance"] < 2 * history[0]["resistance"] < 0


@pytest.mark.nightly
def test_tar_costs_some_of_what_is_retained(laboratory, resistant):
    model, before = resistant[0], laboratory.model()
    assert laboratory.loss(model, "benign") < laboratory.loss(before, "benign") + 0.1
    assert laboratory.loss(model, "refusals") > laboratory.loss(before, "refusals") + 0.05
