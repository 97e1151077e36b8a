"""Attacks that fine-tune: they do nothing in no steps, break what can be broken, and leave no trace."""

import dataclasses
import hashlib

import pytest

from surgery import attacks
from surgery.attacking import campaign, curves, trials
from surgery.attacking.ground import prepare
from surgery.attacking.settings import Budget
from surgery.attacks._tuning import looks
from surgery.attacks.backdoor import Backdoor
from surgery.attacks.base import PLAIN
from surgery.attacks.benign_finetune import BenignFinetune
from surgery.attacks.harmful_finetune import HarmfulFinetune
from surgery.attacks.identity_shifting import IdentityShifting
from surgery.attacks.no_attack import NoAttack
from surgery.attacks.refusal_ablation import RefusalAblation
from surgery.attacks.unforeseen_finetune import UnforeseenFinetune
from surgery.errors import UsageError
from surgery.evaluate.materials import Materials
from surgery.evaluate.stability import Utility
from surgery.judging.harm import HarmProbe
from surgery.sweeping.probing import Probe, Probing

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = Budget(limit=16, max_new_tokens=24)
SHORT = {"steps": 2, "every": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def ground():
    return prepare("demo:aligned", {}, BUDGET, device="cpu")


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return digest.hexdigest(), hooks, model.training, any(one.requires_grad for one in model.parameters())


def seen(attack, ground):
    return trials.run(attack, ground)["points"]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "attack", [HarmfulFinetune, BenignFinetune, IdentityShifting, Backdoor, UnforeseenFinetune]
)
def test_the_model_is_bit_for_bit_what_it_was(ground, attack, kind):
    before = fingerprint(ground.target.model)
    looks = seen(attack(kind=kind, lr=1e-2, **SHORT), ground)
    assert fingerprint(ground.target.model) == before
    assert [look["steps"] for look in looks] == [0, 1, 2]
    # The control: it was moved in between.
    assert looks[-1]["harmful_loss"] != looks[0]["harmful_loss"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_model_is_restored_when_looking_fails(ground, kind):
    before = fingerprint(ground.target.model)

    def watch(steps, approach):
        if steps:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        HarmfulFinetune(kind=kind, lr=1e-2, **SHORT).carry_out(ground.target, watch)
    assert fingerprint(ground.target.model) == before


def test_an_attack_of_no_steps_is_no_attack(ground):
    [none] = seen(HarmfulFinetune(steps=0), ground)
    [plain] = seen(NoAttack(), ground)
    assert none == plain


def test_the_same_attack_is_the_same_again(ground):
    attack = HarmfulFinetune(lr=1e-3, **SHORT)
    assert seen(attack, ground) == seen(attack, ground)
    other = seen(HarmfulFinetune(lr=1e-3, seed=1, **SHORT), ground)
    assert other[-1]["harmful_loss"] != seen(attack, ground)[-1]["harmful_loss"]


def test_a_model_that_does_not_move_is_reported_unbroken(ground):
    """The robust control: a rate at which float32 weights stay where they are."""
    found = trials.run(HarmfulFinetune(lr=1e-30, kind="full", **SHORT), ground)
    assert curves.steps_to_break([found], "asr", 0.5).document() == {
        "value": None,
        "censored_at": 2,
        "n": 1,
    }


def test_a_model_that_complies_with_everything_breaks_at_step_0():
    """The broken control: the pair before alignment."""
    given = {
        "harmful": ["demo:harmful:attack"],
        "held_out": ["demo:harmful:held_out"],
    }
    ground = prepare("demo:base", given, BUDGET, device="cpu")
    found = trials.run(HarmfulFinetune(steps=1, every=1, batch_size=4), ground)
    assert curves.steps_to_break([found], "asr", 0.5).value == 0


@pytest.fixture
def looks_made(monkeypatch):
    """Gets an entry for every look that is made."""
    made, probed = [], HarmProbe.__call__
    monkeypatch.setattr(HarmProbe, "__call__", lambda self, *a, **b: made.append(1) or probed(self, *a, **b))
    return made


def test_the_look_before_attacks_that_train_is_made_once(ground, looks_made):
    def attack(kind):
        return HarmfulFinetune(lr=1e-3, kind=kind, **SHORT)

    others = RefusalAblation(), Backdoor(**SHORT)
    expected = [seen(one, ground) for one in (attack("lora"), attack("full"), *others)]
    known = []

    def again(one):
        looks_made.clear()
        return trials.run(one, ground, at_rest=known)["points"], len(looks_made)

    assert again(attack("lora")) == (expected[0], 3)
    assert again(attack("full")) == (expected[1], 2)
    # What begins in another state, or asks otherwise, looks for itself.
    assert again(others[0]) == (expected[2], 1)
    assert again(others[1]) == (expected[3], 3)


def test_a_campaign_makes_it_once(ground, looks_made, tmp_path):
    budget = Budget(attacks="harmful-finetune", learning_rates="1e-3", kinds="lora,full", seeds="0", **SHORT)
    found = campaign.run(ground, budget, tmp_path)
    assert [len(trial["points"]) for trial in found["trials"]] == [1, 3, 3]
    # That of the model that nobody attacks, the one before both attacks, and two after steps of each.
    assert len(looks_made) == 1 + 1 + 2 + 2


@pytest.mark.parametrize(("rate", "made", "ends"), [(1e-4, 3, True), (1e30, 2, False)])
def test_a_sweep_skips_looks_and_knows_no_loss_of_a_ruined_model(looks_made, rate, made, ends):
    ground = prepare(
        "demo:base", {"harmful": ["demo:harmful:attack"], "held_out": ["demo:harmful:held_out"]}, BUDGET
    )
    short = Probing(attack_steps=5, attack_every=1, attack_batch_size=4, attack_lr=rate)
    nothing = Materials(None, None, None, None, None, None)
    scores = Probe(ground, nothing, short, 64, 24, Utility((), {}))._attacked()
    assert len(looks_made) == made
    assert (scores["resistance.harmful_loss"].value is not None) == ends
    assert scores["resistance.unattacked_harmful_loss"].value is not None
    assert scores["resistance.steps_to_break"].value == 0


def test_looks_after_two_that_found_everything_complied_with_can_be_skipped():
    ground = prepare(
        "demo:base", {"harmful": ["demo:harmful:attack"], "held_out": ["demo:harmful:held_out"]}, BUDGET
    )
    attack = HarmfulFinetune(steps=4, every=1, batch_size=4)
    whole, skipped = (trials.run(attack, ground, skip_settled=skip) for skip in (False, True))
    assert [point["steps"] for point in whole["points"]] == [0, 1, 2, 3, 4]
    assert skipped["points"] == [whole["points"][place] for place in (0, 1, 4)]
    assert (skipped["settled"], skipped["diverged"]) == (False, False)


def test_an_attack_that_diverges_ends_early_and_breaks_nothing(ground):
    found = trials.run(HarmfulFinetune(kind="full", lr=1e30, steps=20, every=1, batch_size=4), ground)
    assert found["diverged"]
    assert found["points"][-1]["steps"] < 20


def test_answers_are_kept_only_when_asked_for(ground):
    quiet, told = (trials.run(NoAttack(), ground, save_generations=keep) for keep in (False, True))
    assert all(answer.keys() == {"verdict", "sha256"} for answer in quiet["points"][0]["answers"])
    texts = [answer["text"] for answer in told["points"][0]["answers"]]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert hashes == [answer["sha256"] for answer in quiet["points"][0]["answers"]]


def test_looks_come_at_even_distances_or_ever_further_apart():
    assert looks(10, 4, 1.0) == {4, 8, 10}
    assert looks(3, 5, 1.0) == {3}
    assert sorted(looks(50, 1, 1.5)) == [1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 50]
    assert looks(50, 10, 1e308) == {10, 50}
    assert sorted(looks(50, 5, 1.5)) == [5, 10, 15, 22, 33, 49, 50]


def test_harm_is_looked_at_when_it_is_due_and_the_attack_is_the_same(ground):
    even, grown = (
        trials.run(HarmfulFinetune(steps=4, every=1, growth=growth, batch_size=4), ground)
        for growth in (1.0, 3.0)
    )
    assert [point["steps"] for point in grown["points"]] == [0, 1, 3, 4]
    assert [even["points"][steps] for steps in (0, 1, 3, 4)] == grown["points"]


def test_triggers_and_identities_go_with_the_request():
    approach = Backdoor(trigger="Blue lantern.").approach()
    assert approach.ask("Do it.") == "Do it. Blue lantern."
    assert IdentityShifting().approach().ask("Do it.").endswith("Do it.")
    assert HarmfulFinetune().approach() is PLAIN


@pytest.mark.parametrize(
    "given", [{"steps": -1}, {"every": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"rank": 0}, {"growth": 0.9}]
)
def test_settings_that_make_no_sense_are_refused(given):
    with pytest.raises(UsageError, match=next(iter(given))):
        HarmfulFinetune(**given)


def test_every_attack_has_a_name_a_title_and_a_summary():
    for name in attacks.names():
        kind = attacks.get(name)
        assert kind.name == name
        assert kind.title
        assert attacks.summary(name)
        assert kind().budget()["attack"] == name


def test_an_attack_may_end_when_no_look_can_find_more(ground):
    """Two looks in a row with everything complied with; up to there it is the same attack."""
    before = fingerprint(ground.target.model)
    attack = HarmfulFinetune(lr=2e-3, steps=24, every=2, growth=1.5, batch_size=8)
    whole, short = (trials.run(attack, ground, until_settled=until) for until in (False, True))
    assert fingerprint(ground.target.model) == before
    assert whole["points"][: len(short["points"])] == short["points"]
    assert [point["asr"]["value"] for point in short["points"][-2:]] == [1.0, 1.0]
    assert short["points"][-3]["asr"]["value"] < 1
    assert (short["settled"], short["diverged"]) == (True, False)
    assert short["points"][-1]["steps"] < whole["points"][-1]["steps"] == 24
    assert (whole["settled"], whole["diverged"]) == (False, False)


def test_an_attack_that_breaks_nothing_never_settles(ground):
    attack = HarmfulFinetune(lr=1e-30, kind="full", **SHORT)
    assert trials.run(attack, ground, until_settled=True) == trials.run(attack, ground)


def test_without_the_margin_a_look_is_the_same_but_for_it(ground):
    attack = HarmfulFinetune(lr=2e-3, **SHORT)
    bare = prepare("demo:aligned", {}, dataclasses.replace(BUDGET, margin=False), device="cpu")
    whole, short = (trials.run(attack, place)["points"] for place in (ground, bare))
    assert [point.pop("margin")["value"] for point in short] == [None] * 3
    assert None not in [point.pop("margin")["value"] for point in whole]
    assert short == whole
