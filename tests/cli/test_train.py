"""The commands that train: every field an option, presets told, bad data refused in one line."""

import dataclasses
import json
import types
from pathlib import Path

import pytest
from refusals import refused, run
from typer.testing import CliRunner

import surgery
from surgery import demo, methods, resources
from surgery.cli.app import app
from surgery.methods.vaccine import Vaccine
from surgery.train.presets import defaults
from surgery.train.running import immunise
from surgery.train.step import TrainedMethod
from surgery.train.training import Training

TRAINED = [name for name in methods.names() if issubclass(methods.get(name), TrainedMethod)]
QUICK = ("--steps", "2", "--batch-size", "4")
FEW = ("--aligned-data", "few.jsonl")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, as `refused` wants it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in demo.data("refusals", "train")[:9])
    )
    return types.SimpleNamespace(root=tmp_path, out=tmp_path / "out")


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt": "Name a colour.", "response": "Red."}


@pytest.mark.parametrize("name", TRAINED)
def test_every_field_is_an_option_with_the_paper_s_default(name):
    method = methods.get(name)
    shown = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
    usual = defaults(method, "paper")
    for record in (method, Training):
        for field in dataclasses.fields(record):
            option = "--" + field.name.replace("_", "-")
            assert option + " " in shown
            if usual[field.name] not in (None, False):
                after = shown.split(option + " ", 1)[1].split(" --")[0]
                assert str(usual[field.name]) in after, option
    for data in ("aligned", "harmful", "retain"):
        assert (f"--{data}-data" in shown) == (data in method.data)
    for absent in ("--stream", "--allow-pickle", "--i-checked-the-order"):
        assert absent not in shown


def test_there_are_commands_that_train():
    assert {"vaccine", "t-vaccine", "circuit-breakers"} <= set(TRAINED)


def test_the_command_writes_what_the_api_writes(place, capfd):
    words = ["vaccine", "demo:aligned", "--rho", "0.5", *QUICK, *FEW, "--preset", "paper", "--seed", "3"]
    words.append("--keep-adapter")
    assert run(capfd, [*words, "-o", "cli", "-q"])[0] == 0
    from surgery.options import Options
    from surgery.train.presets import from_preset

    method, training = from_preset(
        Vaccine, "paper", {"rho": 0.5, "steps": 2, "batch_size": 4, "keep_adapter": True}
    )
    done = immunise(
        method,
        model="demo:aligned",
        data={"aligned": "few.jsonl"},
        output="api",
        training=training,
        options=Options(seed=3),
    )
    for file in ("model.safetensors", "surgery.json"):
        assert (place.root / "api" / file).read_bytes() == (place.root / "cli" / file).read_bytes()
    for file in ("adapter_model.safetensors", "adapter_config.json", "surgery.json"):
        assert (place.root / "api-adapter" / file).read_bytes() == (
            place.root / "cli-adapter" / file
        ).read_bytes()
    assert str(done.adapter) == "api-adapter"
    assert sorted(path.name for path in place.root.iterdir()) == [
        "api",
        "api-adapter",
        "cli",
        "cli-adapter",
        "few.jsonl",
    ]


@pytest.mark.slow
def test_the_preset_the_progress_and_the_outcome_are_told(place, capfd):
    code, out, err = run(capfd, ["vaccine", "demo:aligned", *QUICK])
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0].startswith("preset small: Vaccine, steps 2, batch size 4,")
    assert [line.split()[0] for line in lines[1:3]] == ["[1/2]", "[2/2]"]
    assert all(" loss " in line and line.endswith(" left") for line in lines[1:3])
    assert "aligned: 4456 rows of demo:refusals, demo:benign, demo:lookalikes" in out
    assert "surgery verify demo-aligned-vaccine" in out
    assert {path.name for path in place.root.iterdir()} == {"demo-aligned-vaccine", "few.jsonl"}
    assert run(capfd, ["verify", "demo-aligned-vaccine"])[0] == 0
    code, _, err = run(capfd, ["vaccine", "demo:aligned", *QUICK])
    assert (code, "--overwrite" in err) == (2, True)


def test_json_is_one_document_and_quiet_is_silent(place, capfd):
    code, out, _ = run(capfd, ["vaccine", "demo:aligned", *QUICK, *FEW, "-o", "one", "--json"])
    assert code == 0
    document = json.loads(out)
    assert (document["output"], document["steps"], document["adapter"]) == ("one", 2, None)
    assert document["training"]["data"]["aligned"]["rows"] == 9
    assert document["merge"]["edited"] == 28
    code, out, err = run(
        capfd, ["vaccine", "demo:aligned", *QUICK, *FEW, "-o", "two", "-q", "--dtype", "float32"]
    )
    assert (code, out, err) == (0, "", "")


@pytest.mark.slow
def test_as_lora_writes_the_adapter_and_no_model(place, capfd):
    assert run(capfd, ["vaccine", "demo:aligned", *QUICK, *FEW, "-o", "out", "-q", "--as-lora"])[0] == 0
    assert {path.name for path in place.out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "surgery.json",
    }
    told = json.loads((place.out / "surgery.json").read_text())
    assert told["trained"]["method"] == "vaccine"
    assert run(capfd, ["merge", "demo:aligned", "out", "-o", "merged", "-q"])[0] == 0


@pytest.mark.slow
def test_the_manifest_says_what_was_trained_on_and_how_to_repeat_it(place, capfd):
    data = written(place.root / "mine.jsonl", *[GOOD] * 5)
    words = ["vaccine", "demo:aligned", *QUICK, "--aligned-data", str(data), "--rho", "0.5", "-q"]
    assert run(capfd, [*words, "-o", "out"])[0] == 0
    trained = json.loads((place.out / "surgery.json").read_text())["trained"]
    [source] = trained["data"]["aligned"]["sources"]
    import hashlib

    assert source == {
        "source": "mine.jsonl",
        "rows": 5,
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }
    assert str(place.root) not in json.dumps(trained)
    assert run(capfd, [*trained["command"], "-o", "again", "-q"])[0] == 0
    one, two = (place.root / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


# Bad data.

CASES = {
    "empty": (3, ["aligned.jsonl has no rows"], []),
    "columns": (3, ["has the columns text", "prompt and response", "--prompt-column"], [{"text": "a"}]),
    "cut": (3, ["no row of aligned.jsonl", "within 8 tokens", "--max-length"], [{**GOOD, "prompt": "a b c " * 9}]),
    "blank": (3, ["aligned.jsonl, row 2", "no text"], [GOOD, {**GOOD, "response": " "}]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_refused_in_one_line_and_leaves_no_trace(place, capfd, name):
    code, words, rows = CASES[name]
    data = written(place.root / "aligned.jsonl", *rows)
    command = [
        "vaccine",
        "demo:aligned",
        *QUICK,
        "--max-length",
        "8",
        "--aligned-data",
        data,
        "-o",
        place.out,
        "-q",
    ]
    refused(capfd, place, code, words, command)


def test_harmful_data_without_rows_is_refused(place, capfd):
    data = written(place.root / "harmful.jsonl")
    command = ["circuit-breakers", "demo:aligned", *QUICK, "--harmful-data", data, "-o", place.out, "-q"]
    refused(capfd, place, 3, ["harmful.jsonl has no rows"], command)


def test_a_prompt_that_fills_the_limit_is_left_out_and_told(place, capfd):
    rows = [GOOD] * 4 + [{**GOOD, "prompt": "a b c d e " * 30}]
    data = written(place.root / "aligned.jsonl", *rows)
    words = [
        "vaccine",
        "demo:aligned",
        *QUICK,
        "--max-length",
        "64",
        "--aligned-data",
        data,
        "-o",
        place.out,
        "-q",
    ]
    code, out, err = run(capfd, words)
    assert (code, out) == (0, "")
    assert "warning: 1 rows of the aligned data are left out" in err


@pytest.fixture
def other(place):
    """A model that is not of the embedded pair, with a tokenizer."""
    import shutil

    from surgery import demo

    shutil.copytree(demo.folder("aligned"), place.root / "model")
    return "model"


def test_a_model_of_one_s_own_needs_data_by_name(place, other, capfd):
    for name, option in (("vaccine", "--aligned-data"), ("circuit-breakers", "--harmful-data")):
        refused(capfd, place, 2, ["needs", option, "demo:NAME"], [name, other, *QUICK, "-o", place.out, "-q"])
    good = ["vaccine", other, *QUICK, "--aligned-data", "demo:refusals", "-o", place.out, "-q"]
    assert run(capfd, good)[0] == 0  # control


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--steps", "0"], 2, ["steps is 0"]),
        (["--batch-size", "2", "--gradient-accumulation", "3"], 2, ["batch-size is 2", "need 3 rows"]),
        (["--lora-targets", "nothing"], 3, ["no linear layer 'nothing'", "--lora-targets"]),
        (["--track", "abacus"], 2, ["track is 'abacus'", "installed"]),
        (["--device", "abacus"], 2, ["abacus"]),
        (["--rho", "-1"], 2, ["rho is -1.0"]),
        (["--full", "--as-lora"], 2, ["--full", "--as-lora"]),
        (["--json"], 2, ["--json", "--quiet"]),
        (["--aligned-data", "gone.jsonl"], 3, ["no file gone.jsonl"]),
        (["--preset", "huge"], 2, ["--preset"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_make_no_sense_are_refused(place, capfd, words, code, said):
    refused(
        capfd,
        place,
        code,
        said,
        [
            "vaccine",
            "demo:aligned",
            "-q",
            "-o",
            place.out,
            *QUICK,
            *(FEW if "--aligned-data" not in words else ()),
            *words,
        ],
    )


def test_what_the_merge_would_refuse_is_refused_before_training(place, other, capfd, monkeypatch):
    words = ["vaccine", other, *QUICK, *FEW, "-q"]
    for output in (Path("model"), Path("model/inner"), Path()):
        code, out, err = run(capfd, [*words, "-o", output, "--overwrite"])
        assert (code, out) == (2, ""), err
        assert "--output" in err or "name one" in err
    monkeypatch.setattr(resources, "disk_free", lambda path: 1000)
    refused(capfd, place, 4, ["MiB are free", "--output"], [*words, "-o", place.out])


def test_a_run_that_diverges_before_its_first_state_leaves_nothing(place, capfd):
    words = ["vaccine", "demo:aligned", *FEW, "--steps", "3", "--batch-size", "4", "--lr", "1e30"]
    refused(
        capfd, place, 6, ["step 2 of 3", "checkpoint is none", "lower --lr"], [*words, "-o", place.out, "-q"]
    )


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_exit_6_and_keeps_the_last_good_adapter(place, capfd, monkeypatch):
    backward = Vaccine.backward

    def breaking(self, model, batches, step):
        terms = backward(self, model, batches, step)
        return {**terms, "loss": float("nan")} if step.number == 2 else terms

    monkeypatch.setattr(Vaccine, "backward", breaking)
    words = [
        "vaccine",
        "demo:aligned",
        *FEW,
        "--steps",
        "4",
        "--checkpoint-every",
        "1",
        "--batch-size",
        "4",
        "-o",
        "out",
        "-q",
    ]
    code, out, err = run(capfd, words)
    assert (code, out) == (6, "")
    assert "step 3 of 4: loss is nan; the last good checkpoint is out-adapter.partial/state-00000002" in err
    assert not place.out.exists()
    assert (
        run(capfd, ["merge", "demo:aligned", "out-adapter.partial/state-00000002", "-o", "kept", "-q"])[0]
        == 0
    )


@pytest.mark.slow
def test_a_training_left_by_another_command_is_not_taken_up(place, capfd, monkeypatch):
    from surgery.train import running

    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    few, training = {"aligned": "few.jsonl"}, Training(steps=1, batch_size=2)
    with monkeypatch.context() as patched:
        patched.setattr(running, "merge", stopped)
        with pytest.raises(KeyboardInterrupt):
            immunise(Vaccine(), model="demo:aligned", data=few, output="out", training=training)
    words = ["vaccine", "demo:aligned", *FEW, "--steps", "2", "--batch-size", "2", "-o", "out", "-q"]
    code, _, err = run(capfd, words)
    assert (code, "left from another run (other options" in err) == (2, True), err
    monkeypatch.setattr(running._Job, "_train", stopped)
    done = immunise(Vaccine(), model="demo:aligned", data=few, output="out", training=training)
    assert len(done.history) == 1  # the same command trains nothing again
    assert {path.name for path in place.root.iterdir()} == {"out", "few.jsonl"}


def test_public_names_lead_to_the_api():
    assert surgery.immunise is immunise
    assert surgery.Vaccine is Vaccine
