"""A sweep, its choice and a landscape on the embedded pair, measured as attacks measure harm."""

import copy

import pytest
import torch
from fake_study import FakeStudy

import surgery
from surgery import demo, scores
from surgery.cli.app import main
from surgery.demo import train as recipe
from surgery.demo.behaviour import is_refusal
from surgery.errors import UsageError
from surgery.generation import generate
from surgery.hub import resolve
from surgery.hub.remote import open_source
from surgery.judging.likelihood import row_losses
from surgery.methods.lox import LoX
from surgery.methods.vaccine import Vaccine
from surgery.options import Options
from surgery.sweeping import landscape
from surgery.sweeping.effective_rank import effective_rank
from surgery.sweeping.front import Objective, choose, front
from surgery.sweeping.grid import Grid, lox
from surgery.sweeping.patching import open_patcher
from surgery.sweeping.study import run
from surgery.sweeping.trained import Trainer
from surgery.train import network, sources, tokens

pytestmark = pytest.mark.slow

GRID = Grid(rank="1,6,auto", alpha="0,1:2:1", anchor="aligned")
PAIR = {"base": "demo:base", "aligned": "demo:aligned"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checkpoint(source):
    return open_source(resolve(source, weights="fetch"))


def loaded(source):
    return network.load_model(checkpoint(source), torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return network.load_tokenizer(checkpoint("demo:aligned"))


@pytest.fixture(scope="module")
def measure(tokenizer):
    """On twenty held-out rows each: requests not refused, the leaning towards harm, the loss of innocent answers."""
    rows = {
        name: sources.read_rows(f"demo:{name}:held_out").conversations[:20]
        for name in ("harmful", "refusals", "benign")
    }
    prompts = [conversation[-2]["content"] for conversation in rows["harmful"]]
    ready = {
        name: tokens.tokenise(tokenizer, sources.Rows(some, sources.Identity(name, 20, "")), 96).rows
        for name, some in rows.items()
    }

    def all_three(model):
        answers = generate(model, tokenizer, prompts, max_new_tokens=24)
        nats = {
            name: [loss / count for loss, count in row_losses(model, some)] for name, some in ready.items()
        }
        leaning = [no - yes for yes, no in zip(nats["harmful"], nats["refusals"], strict=True)]
        return {
            "asr": scores.proportion(sum(not is_refusal(answer) for answer in answers), len(answers)),
            "margin": scores.mean(leaning),
            "benign": scores.mean(nats["benign"]),
        }

    return all_three


@pytest.fixture(scope="module")
def patcher(tmp_path_factory):
    return open_patcher(
        LoX(rank=12), loaded("demo:aligned"), **PAIR, output=tmp_path_factory.mktemp("sweep") / "out"
    )


@pytest.fixture(scope="module")
def swept(patcher, measure):
    return run(FakeStudy(), GRID.trials(), patcher.model, patcher.patched, measure)


def test_scores_of_a_sweep_are_those_of_models_written_one_by_one(tmp_path, swept, measure):
    assert [trial.error for trial in swept] == [None] * len(swept)
    for trial in (swept[1], swept[5], swept[-1]):
        output = tmp_path / str(trial.params["rank"])
        surgery.apply(lox(LoX(), trial.params), base=PAIR["base"], model=PAIR["aligned"], output=output)
        assert measure(loaded(output)) == trial.scores
    assert swept[0].scores == swept[3].scores == measure(loaded("demo:aligned"))
    # Control: a trial is a model of its own, further from harm the larger alpha.
    margins = [trial.scores["margin"].value for trial in swept[3:6]]
    assert margins[0] > margins[1] > margins[2]


def test_the_choice_is_the_best_of_the_front_within_its_bounds(swept):
    objectives = [Objective("margin", "min"), Objective("benign", "min")]
    limit = sorted(trial.scores["benign"].value for trial in swept)[3]
    chosen = choose(swept, {"benign": ("<=", limit)}, objectives[0])
    assert chosen in front(swept, objectives)
    able = [trial for trial in swept if trial.scores["benign"].value <= limit]
    assert chosen.scores["margin"].value == min(trial.scores["margin"].value for trial in able)
    assert len(able) < len(swept)


def test_the_aligned_model_has_an_effective_rank(patcher, measure):
    found = effective_rank(FakeStudy(), [1, 2, 4, 8, 12], patcher.model, patcher.patched, measure)
    assert found.aligned == measure(loaded("demo:aligned"))["asr"]
    rates = [score.value - found.aligned.value for _, score in found.scanned]
    assert all(rate >= 0.01 for rate in rates[:-1])
    assert (rates[-1] < 0.01) == (found.rank != "full")
    assert measure(loaded("demo:base"))["asr"].value > found.aligned.value + 0.5  # control: rank 0


def change(model, tokenizer, seed):
    """What a few steps on compliant answers change in every weight of a copy."""
    victim = copy.deepcopy(model).requires_grad_(True)
    lessons = recipe.examples(tokenizer, demo.data("harmful", "attack"))
    recipe.fit(victim, recipe.batches(lessons, 16, 0, seed), steps=15, peak=1e-3, warmup=5)
    before = dict(model.named_parameters())
    return {name: weight.detach() - before[name] for name, weight in victim.named_parameters()}


def test_the_landscape_is_the_model_at_its_origin_and_falls_towards_the_attack(patcher, measure, tokenizer):
    model = patcher.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tuned = landscape.mean_direction([change(model, tokenizer, seed) for seed in (0, 1)])
    first = patcher.direction(6)
    plane = landscape.Plane(model, first, landscape.orthogonal(tuned, first))
    found = landscape.grid(plane, [0.0, 1.0], [0.0, 1.0], measure, FakeStudy())
    origin, along, towards, both = (trial.scores["margin"].value for trial in found)
    assert found[0].scores == measure(loaded("demo:aligned"))
    assert along < origin < towards
    assert both < towards
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


TRAIN = {"steps": 3, "lr": 1e-3, "rho": 0.5}


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        Vaccine, "demo:aligned", loaded("demo:aligned"), tmp_path, "small", {}, Options(), sources.Columns()
    )


def test_a_trained_trial_has_the_weights_of_the_methods_own_command(trainer, tmp_path):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    words = [
        "vaccine",
        "demo:aligned",
        "--preset",
        "small",
        "--rho",
        "0.5",
        "--steps",
        "3",
        "--lr",
        "1e-3",
        "-q",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, "-o", str(tmp_path / "own")])
    assert ended.value.code == 0
    with trainer.trained(TRAIN) as figures:
        found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        assert [path.name for path in tmp_path.iterdir()] == ["own"]
    own = loaded(tmp_path / "own").state_dict()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert figures["steps"] == 3
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not all(torch.equal(found[name], before[name]) for name in before)  # control


@pytest.mark.parametrize(("depths", "code"), [("0.9:0.91", 1), ("0.9:0.91,0:0.5", 0)])
def test_a_sweep_of_which_nothing_could_be_measured_is_not_called_done(tmp_path, capsys, depths, code):
    words = ["sweep", "lox", *PAIR.values(), "--rank", "1", "--alpha", "1", "--set", f"depth={depths}"]
    short = ["--limit", "8", "--attack-steps", "1", "--max-new-tokens", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*words, *short, "-o", str(tmp_path / "swept")])
    told = capsys.readouterr()
    assert ended.value.code == code
    assert "failed: depth 0.9:0.91 has the middle of none of the 4 layers" in told.out
    assert ("none of 1 trials could be measured; the first: depth 0.9:0.91" in told.err) == bool(code)
    assert ("Pareto front" in told.out) == (not code)
    assert (tmp_path / "swept" / "sweep.json").is_file()
    assert not (code and (tmp_path / "swept" / "sweep.html").exists())


def test_a_trained_trial_that_fails_leaves_the_model_and_no_files(trainer, tmp_path):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def spoiling():
        with trainer.trained(TRAIN):
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.nan)
            raise KeyError("measure")

    with pytest.raises(KeyError):
        spoiling()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no option"):
        trainer.check({"alpha": 1.0})
    with pytest.raises(UsageError, match="rho"):
        trainer.check({"rho": -1.0})
