"""Grids as they are spelt, studies that go on, and what cannot be swept."""

from contextlib import contextmanager
from decimal import Decimal

import pytest
import torch
from fake_study import FakeStudy, exact
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.errors import CheckError, InputError, Interrupted, UsageError
from surgery.hub import resolve
from surgery.hub.remote import open_source
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.scores import Censored
from surgery.sweeping import factors
from surgery.sweeping.effective_rank import effective_rank, ladder
from surgery.sweeping.front import Objective, choose, front
from surgery.sweeping.grid import Grid, lox
from surgery.sweeping.patching import open_patcher
from surgery.sweeping.study import Measured, run
from surgery.testing import tiny_pair
from surgery.train import network

pytestmark = pytest.mark.usefixtures("one_thread")

RANK_3 = LoX(rank=3)
TRIAL = {"rank": 2, "alpha": 1.5, "anchor": "aligned"}


def alphas(text):
    return [trial["alpha"] for trial in Grid(rank="1", alpha=text).trials()]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1:0.5:0.1", [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("0.5:2:0.25", [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("1:1:1", [1.0]),
        (" 2 , 0.5,2,1e-1:3e-1:1e-1 ", [2.0, 0.5, 0.1, 0.2, 0.3]),
    ],
)
def test_ranges_have_both_ends_and_numbers_are_as_they_are_spelt(text, values):
    assert alphas(text) == values


@given(
    start=st.decimals(0, 20, places=3),
    step=st.decimals("0.001", 5, places=3),
    count=st.integers(1, 60),
    over=st.decimals(0, "0.999", places=3),
)
def test_a_range_of_any_decimals_has_every_step_and_no_drift(start, step, count, over):
    stop = start + (count - 1) * step + over * step
    found = alphas(f"{start}:{stop}:{step}")
    assert found == [float(start + number * step) for number in range(count)]
    assert all(Decimal(str(value)) == start + number * step for number, value in enumerate(found))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "alpha is empty"),
        (",", "alpha is empty"),
        ("x", "alpha has 'x'"),
        ("1:2", "FROM:TO:STEP"),
        ("1:2:3:4", "FROM:TO:STEP"),
        ("1::2", "FROM:TO:STEP"),
        ("2:1:0.5", "FROM must not be above TO"),
        ("1:2:0", "STEP must be above 0"),
        ("1:2:-1", "STEP must be above 0"),
        ("0:1:1e-9", "values; 10000 is the most"),
        ("0:1:1e-999999999", "FROM:TO:STEP"),
        ("nan", "alpha has 'nan'"),
        ("inf", "alpha has 'inf'"),
        ("-0.5", "alpha is -0.5; with the aligned anchor it must be at least 0"),
    ],
)
def test_what_is_no_grid_is_refused(text, reason):
    with pytest.raises(UsageError) as caught:
        alphas(text)
    assert reason in str(caught.value)


def test_ranks_are_whole_numbers_auto_or_full_and_anchors_bound_alpha():
    trials = Grid(rank="1:7:3,auto,full,4", alpha="1,1.5", anchor="aligned,base").trials()
    assert [trial["rank"] for trial in trials[::4]] == [1, 4, 7, "auto", "full"]
    assert [(trial["alpha"], trial["anchor"]) for trial in trials[:4]] == [
        (1.0, "aligned"), (1.0, "base"), (1.5, "aligned"), (1.5, "base"),
    ]  # fmt: skip
    assert Grid(rank="1:7:3,full").largest() == 7
    assert Grid(rank="auto,full").largest() is None
    for wrong, reason in (("1.5", "whole numbers"), ("0", "rank is 0"), ("best", "rank has 'best'")):
        with pytest.raises(UsageError, match=reason):
            Grid(rank=wrong).trials()
    with pytest.raises(UsageError, match="with the base anchor it must be at least 1"):
        Grid(alpha="0.5,1", anchor="aligned,base").trials()
    with pytest.raises(UsageError, match="anchor has 'sideways'"):
        Grid(anchor="sideways").trials()


def test_a_trial_is_the_edit_that_the_command_would_make():
    method = LoX(edit="linear", exclude="o_proj")
    trial = Grid(rank="3", alpha="0.75").trials(method)[0]
    assert lox(method, trial) == LoX(rank=3, alpha=0.75, edit="linear", exclude="o_proj")


class Bench:
    """States that are numbers, and how often each was measured."""

    def __init__(self, broken=(), stopped=()):
        self.model, self.broken, self.stopped = torch.nn.Identity(), broken, stopped
        self.current, self.measured = None, []

    @contextmanager
    def state(self, params):
        self.current = params["x"]
        yield {"twice": 2 * params["x"]}
        self.current = None

    def measure(self, model):
        self.measured.append(self.current)
        if self.current in self.stopped:
            raise Interrupted(15)
        if self.current in self.broken:
            raise InputError(f"cannot measure {self.current}")
        return {"value": exact(float(self.current)), "steps": Censored(None, 9.0, 2)}

    def run(self, study, xs, progress=None):
        return run(study, [{"x": x} for x in xs], self.model, self.state, self.measure, progress)


def test_results_come_in_the_order_of_the_grid_and_as_they_were_measured():
    bench, told = Bench(), []
    found = bench.run(FakeStudy(), [3, 1, 2], lambda *news: told.append(news))
    assert [one.scores["value"] for one in found] == [exact(3.0), exact(1.0), exact(2.0)]
    assert found[0].scores["steps"] == Censored(None, 9.0, 2)
    assert found[1].figures == {"twice": 2}
    assert [(done, total, one.params["x"]) for done, total, one in told] == [(1, 3, 3), (2, 3, 1), (3, 3, 2)]
    assert found[0].document()["scores"]["steps"] == {"value": None, "censored_at": 9.0, "n": 2}


def test_a_study_that_goes_on_measures_only_what_is_missing():
    study, bench = FakeStudy(), Bench()
    first = bench.run(study, [1, 2])
    found = bench.run(study, [0, 1, 2, 3])
    assert bench.measured == [1, 2, 0, 3]
    assert [one.params["x"] for one in found] == [0, 1, 2, 3]
    assert found[1:3] == first
    assert [one.params["x"] for one in bench.run(study, [3, 0])] == [3, 0]
    assert len(bench.measured) == 4
    assert Bench().run(FakeStudy(), [1, 2]) == first  # control: a study of its own measures all again


def test_a_trial_that_fails_is_kept_with_its_reason_and_the_others_go_on():
    bench = Bench(broken=(2,))
    found = bench.run(FakeStudy(), [1, 2, 3])
    assert [one.error for one in found] == [None, "cannot measure 2", None]
    assert found[1].scores == {}
    assert found[1].document()["error"] == "cannot measure 2"
    with pytest.raises(UsageError, match="no trial measured other"):
        front(found, [Objective("other", "max")])
    assert [one.params["x"] for one in front(found, [Objective("value", "max")])] == [3]


def test_an_interrupted_trial_is_no_failure_and_runs_again():
    study, bench = FakeStudy(), Bench(stopped=(2,))
    with pytest.raises(Interrupted):
        bench.run(study, [1, 2, 3])
    study.give_back()
    bench.stopped = ()
    found = bench.run(study, [1, 2, 3])
    assert [one.error for one in found] == [None, None, None]
    assert bench.measured == [1, 2, 2, 3]


def test_trials_that_others_still_run_are_left_out():
    study, bench = FakeStudy(), Bench()
    study.add([{"x": 2}])
    study.claim()
    assert [one.params["x"] for one in bench.run(study, [1, 2, 3])] == [1, 3]


def test_a_scan_says_when_there_is_no_rate():
    bench = Bench()
    with pytest.raises(InputError, match="no asr at rank full: the measure gave none"):
        effective_rank(FakeStudy(), [1], bench.model, lambda params: bench.state({"x": 1}), bench.measure)
    study = FakeStudy()
    study.add([{"rank": "full", "alpha": 1.0, "anchor": "base"}])
    study.claim()
    with pytest.raises(InputError, match="another process"):
        effective_rank(study, [1], bench.model, lambda params: bench.state({"x": 1}), bench.measure)


def test_the_ladder_climbs_to_the_top():
    assert ladder(12) == [1, 2, 3, 4, 6, 8, 12]
    assert ladder(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert ladder(1) == [1]
    assert ladder(100)[-4:] == [48, 64, 96, 100]


def measured(x, **values):
    return Measured({"x": x}, {name: exact(value) for name, value in values.items()}, {})


def test_the_best_within_bounds_is_chosen_and_the_first_of_equals():
    trials = [
        measured(1, gain=0.2, ratio=1.0),
        measured(2, gain=0.9, ratio=1.05),
        measured(3, gain=0.5, ratio=1.02),
        measured(4, gain=0.5, ratio=1.01),
        measured(5, gain=None, ratio=1.0),
    ]
    bounds = {"ratio": ("<=", 1.02)}
    assert choose(trials, bounds, Objective("gain", "max")) is trials[2]
    assert choose(trials, {}, Objective("gain", "max")) is trials[1]
    assert choose(trials, bounds, Objective("gain", "min")) is trials[0]
    with pytest.raises(CheckError) as caught:
        choose(trials, {"ratio": ("<=", 1.04), "gain": (">=", 0.8)}, Objective("gain", "max"))
    assert str(caught.value) == (
        "none of 4 trials has ratio <= 1.04, gain >= 0.8; nearest is x 2 with ratio 1.05: loosen that bound or "
        "sweep further"
    )
    with pytest.raises(UsageError, match="no trial measured speed; measured were gain, ratio"):
        choose(trials, {"speed": ("<=", 1.0)}, Objective("gain", "max"))
    with pytest.raises(CheckError, match="no trial came to a number"):
        choose([trials[4]], bounds, Objective("gain", "max"))


def open_tiny(tmp_path, pair=None, method=RANK_3, rounding="nearest", **options):
    base, aligned = pair or tiny_pair(tmp_path)
    model = network.load_model(open_source(resolve(aligned, weights="fetch")), torch.float32)
    return open_patcher(
        method,
        model,
        base=base,
        aligned=aligned,
        output=tmp_path / "sweep",
        options=Options(rounding=rounding, **options),
    )


def weights(patch, params=TRIAL):
    with patch.patched(params):
        return {name: weight.detach().clone() for name, weight in patch.model.named_parameters()}


def test_factors_are_made_once_and_kept(tmp_path, monkeypatch):
    pair = tiny_pair(tmp_path)
    made = []
    monkeypatch.setattr(factors, "_made", lambda job, own=factors._made: made.append(job) or own(job))
    first = weights(open_tiny(tmp_path, pair))
    again = weights(open_tiny(tmp_path, pair))
    assert len(made) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    open_tiny(tmp_path, pair, rounding="auto")
    assert len(made) == 1
    open_tiny(tmp_path, pair, LoX(rank=4))
    open_tiny(tmp_path, pair, LoX(rank=3, exclude="lm_head"))
    assert len(made) == 3
    # Another alignment under the same names is another pair.
    file = pair[1] / "model.safetensors"
    save_file({name: -value for name, value in load_file(file).items()}, file, {"format": "pt"})
    open_tiny(tmp_path, pair)
    assert len(made) == 4
    assert not list((tmp_path / "sweep").glob("*.partial"))


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, None], ids=["empty", "zeros", "cut"])
def test_damaged_factors_are_made_anew(tmp_path, damage):
    pair = tiny_pair(tmp_path)
    first, file = weights(open_tiny(tmp_path, pair)), tmp_path / "sweep" / "factors-r3.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2] if damage is None else damage)
    again = weights(open_tiny(tmp_path, pair))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(file.read_bytes()) == len(sound)  # whole again


def test_a_patch_leaves_the_number_of_threads_alone(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_tiny(tmp_path).patched(TRIAL):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_patcher_cannot_do_is_refused(tmp_path):
    pair = tiny_pair(tmp_path)
    patch = open_tiny(tmp_path, pair)
    for params, reason in (
        ({**TRIAL, "rank": 4}, "rank is 4, and this sweep was decomposed at rank 3"),
        ({**TRIAL, "alpha": -1.0}, "at least 0"),
    ):
        with pytest.raises(UsageError, match=reason), patch.patched(params):
            pass
    for options in ({"dtype": "float32"}, {"as_lora": True}, {"stream": True}):
        with pytest.raises(UsageError, match="leave out --as-lora, --stream and --dtype"):
            open_tiny(tmp_path, pair, **options)
    with pytest.raises(UsageError, match="rank is auto"):
        open_tiny(tmp_path, pair, LoX(rank="auto"))
    with pytest.raises(UsageError, match="rank is 500"):
        open_tiny(tmp_path, pair, LoX(rank=500))


def test_a_pair_that_alignment_did_not_change_is_refused(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    (aligned / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with (
        pytest.raises(InputError, match="hold the same weights"),
        open_tiny(tmp_path, (base, aligned)).patched(TRIAL),
    ):
        pass


def test_tied_tensors_stored_twice_are_refused(tmp_path):
    pair = tiny_pair(tmp_path, "llama-tied")
    open_tiny(tmp_path, pair)  # control: stored once they are edited once
    for folder in pair:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="one parameter in the model and two tensors"):
        open_tiny(tmp_path, pair)


def test_an_edited_tensor_that_the_model_lacks_is_refused(tmp_path):
    pair = tiny_pair(tmp_path)
    for folder in pair:
        tensors = load_file(folder / "model.safetensors")
        own = tensors["model.layers.0.mlp.down_proj.weight"]
        tensors["mtp.down_proj.weight"] = own.clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"mtp\.down_proj\.weight is edited, but the model in memory has no such"
    ):
        open_tiny(tmp_path, pair)
    open_tiny(tmp_path, pair, LoX(rank=3, exclude="mtp"))  # the way out that the message names
