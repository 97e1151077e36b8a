"""attack, evaluate, sweep, landscape and gate on the embedded pair, as a user calls them."""

import json
import re

import pytest

from surgery.cli.app import main

pytestmark = pytest.mark.slow

SHORT = ["--learning-rates", "5e-4", "--kinds", "lora", "--steps", "6", "--every", "3", "--limit", "16"]


def surgery(*words, code=0):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == code


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lox") / "out"
    surgery("lox", "demo:base", "demo:aligned", "--rank", 6, "--alpha", 1.5, "-q", "-o", folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(edited, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    surgery(
        "evaluate", edited, "--reference", "demo:aligned", *SHORT, "--steps", 12, "--attacks",
        "harmful-finetune,prefill",
        "--rows", 16, "--practice-steps", 12, "--export", "tamperbench", "-q", "-o", folder,
    )  # fmt: skip
    return folder


def test_an_attack_gives_curves_and_is_not_run_twice(tmp_path, capsys):
    out = tmp_path / "attacked"
    surgery("attack", "demo:aligned", *SHORT, "-o", out)
    first = (out / "curves.json").read_bytes()
    found = json.loads(first)
    assert [point["steps"] for point in found["trials"][1]["points"]] == [0, 3, 6]
    assert found["attacks"]["harmful-finetune"]["steps_to_break"]["n"] == 1
    capsys.readouterr()
    surgery("attack", "demo:aligned", *SHORT, "-o", out)
    shown = capsys.readouterr()
    assert "[1/" not in shown.err  # every trial was there
    assert (out / "curves.json").read_bytes() == first


def test_a_study_of_another_budget_is_refused(tmp_path, capsys):
    out = tmp_path / "attacked"
    surgery("attack", "demo:aligned", *SHORT, "--steps", 0, "-o", out)
    before = (out / "curves.json").read_bytes()
    surgery("attack", "demo:aligned", *SHORT, "--steps", 0, "--limit", 8, "-o", out, code=3)
    assert (out / "curves.json").read_bytes() == before
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) > 20


def test_nothing_of_an_attacked_model_is_written(tmp_path):
    surgery("attack", "demo:aligned", *SHORT, "--steps", 1, "--attacks", "harmful-finetune,prefill", "-q",
            "-o", tmp_path / "out")  # fmt: skip
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".safetensors", ".bin", ".pt"))]


def test_lox_makes_the_pair_break_later(evaluated):
    report = json.loads((evaluated / "report.json").read_text())
    ours, theirs = report["metrics"], report["reference_metrics"]
    name = "resistance.steps_to_break"
    assert (ours[name]["value"] or 99) > theirs[name]["value"]
    assert (
        ours["resistance.worst_case_harmful_loss"]["low"]
        > theirs["resistance.worst_case_harmful_loss"]["high"]
    )
    assert ours["resistance.unattacked_asr"]["value"] == 0
    assert set(report["mechanism"]["model"]) >= {"kappa_harmful", "kappa_benign", "drift_under_attack"}


def test_every_number_of_a_report_has_n_and_an_interval(evaluated):
    report = json.loads((evaluated / "report.json").read_text())
    for score in [*report["metrics"].values(), *report["reference_metrics"].values()]:
        assert score["n"] >= 1
        assert "censored_at" in score or {"low", "high", "interval"} <= score.keys()


def test_the_report_keeps_no_answer(evaluated):
    text = (evaluated / "report.json").read_text()
    assert '"text"' not in text
    assert "To brew" not in text


def test_pages_name_no_outside_address(evaluated):
    for page in evaluated.rglob("*.html"):
        assert not re.search(r"https?://(?!www\.w3\.org/)", re.sub(r"<a [^>]*>", "", page.read_text()))


def test_the_same_attacks_are_written_for_tamperbench(evaluated):
    import yaml

    grid = yaml.safe_load((evaluated / "tamperbench" / "lora_finetune" / "grid.yaml").read_text())
    assert grid["base"]["learning_rate"] == 5e-4
    flat = json.loads((evaluated / "report.json").read_text())["trial_results"]
    assert 0 <= flat["post_attack.lora_finetune.asr"] <= 1


def test_the_gate_passes_and_fails_by_its_policy(evaluated, tmp_path, capsys):
    policy = tmp_path / "policy.toml"
    policy.write_text('require = ["stability.perplexity_ratio <= 2"]\n')
    surgery("gate", evaluated / "report.json", "--policy", policy)
    policy.write_text('require = ["resistance.steps_to_break >= 1000"]\n')
    surgery("gate", evaluated / "report.json", "--policy", policy, code=1)
    policy.write_text('require = ["resistance.no_such_thing >= 1"]\n')
    surgery("gate", evaluated / "report.json", "--policy", policy, code=1)
    policy.write_text("require = 3\n")
    surgery("gate", evaluated / "report.json", "--policy", policy, code=3)
    assert "Traceback" not in capsys.readouterr().err


def test_a_sweep_marks_its_front_and_writes_the_best(tmp_path, capsys):
    out = tmp_path / "sweep"
    words = ["sweep", "lox", "demo:base", "demo:aligned", "--rank", "1,6", "--alpha", "0,1.5", "--limit", "16",
             "--attack-steps", "6", "-o", out]  # fmt: skip
    surgery(*words, "--max-perplexity-ratio", "2", "--choose", tmp_path / "best")
    found = json.loads((out / "sweep.json").read_text())
    still = [trial for trial in found["trials"] if trial["params"]["alpha"] == 0]
    moved = next(
        trial
        for trial in found["trials"]
        if trial["params"] == {"rank": 6, "alpha": 1.5, "anchor": "aligned"}
    )
    for trial in still:
        assert trial["scores"]["stability.perplexity_ratio"]["value"] == 1
    assert (
        moved["scores"]["resistance.harmful_loss"]["value"]
        > still[0]["scores"]["resistance.harmful_loss"]["value"]
    )
    assert any(trial["front"] for trial in found["trials"])
    assert (tmp_path / "best" / "surgery.json").is_file()
    surgery(*words, "--bound", "stability.perplexity_ratio <= 0.001", "--choose", tmp_path / "none", code=1)
    assert not (tmp_path / "none").exists()
    one = ["--rank", "6", "--alpha", "1.5", "--limit", "16", "--attack-steps", "6", "-o", tmp_path / "bare"]
    surgery("sweep", "lox", "demo:base", "demo:aligned", *one, "--no-margin")
    [bare] = json.loads((tmp_path / "bare" / "sweep.json").read_text())["trials"]
    margins = [trial["scores"].pop("resistance.margin")["value"] for trial in (moved, bare)]
    assert margins[0] is not None
    assert margins[1] is None
    assert bare["scores"] == moved["scores"]


def test_the_landscape_has_the_aligned_model_at_its_origin(tmp_path):
    surgery("landscape", "demo:base", "demo:aligned", "--x=-1,0", "--y", "0,0.15", "--limit", 16, "--tunings", 1,
            "--attack-steps", 20, "-q", "-o", tmp_path / "out")  # fmt: skip
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    rate = {
        (one["params"]["x"], one["params"]["y"]): one["scores"]["asr"]["value"] for one in found["points"]
    }
    assert rate[0, 0] == 0
    assert rate[-1, 0] > 0.5
    assert rate[0, 0.15] > 0.5


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["attack", "demo:aligned", "--learning-rates", "fast"], 2),
        (["attack", "demo:aligned", "--attacks", "wish"], 2),
        (["attack", "demo:aligned", "--attacks", "reverse-lox"], 2),
        (["attack", "no-such-folder", "--harmful-data", "demo:harmful"], 3),
        (["attack", "demo:aligned", "--harmful-data", "none.jsonl"], 3),
        (["attack", "demo:aligned", "--judge", "oracle"], 2),
        (["evaluate", "demo:aligned", "--rows", "1"], 2),
        (["evaluate", "demo:aligned", "--attacks", "wish"], 2),
        (["evaluate", "demo:aligned", "--attacks", "reverse-lox"], 2),
        (["evaluate", "demo:aligned", "--choices", "none.jsonl"], 3),
        (["sweep", "lox", "demo:base", "demo:aligned", "--alpha", "-1"], 2),
        (["sweep", "lox", "demo:base", "demo:aligned", "--bound", "asr < 1"], 2),
        (["sweep", "vaccine", "demo:aligned", "--set", "rho=1,-1"], 2),
        (["sweep", "circuit-breakers", "demo:aligned", "--set", "spare=0.5,1.5"], 2),
        (["landscape", "demo:base", "demo:aligned", "--x", "a"], 2),
        (["gate", "none.json", "--policy", "none.toml"], 3),
    ],
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(words, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    surgery(*words, code=code)
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert len(shown.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
