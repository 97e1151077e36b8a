"""`surgery ci` as docs/ci.md has it, against the Hub on loopback: the whole way, again, and where it stops."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pushes
import pytest
import yaml
from pushes import held, puts

pytestmark = pytest.mark.slow

# Fixtures are found by name in the module of the tests.
made, out, hub, command = pushes.made, pushes.out, pushes.hub, pushes.command

ROOT = Path(__file__).parents[2]


def example(name):
    """A file as the page shows it."""
    page = (ROOT / "docs" / "ci.md").read_text()
    block = re.search(rf"^    # {re.escape(name)}\n((?:    .*\n|\n)*?)(?=^    # |^\S)", page, re.MULTILINE)
    return textwrap.dedent(block[1])


@pytest.fixture
def place(hub, command, tmp_path):
    """A folder with the two files of the page; the account may write to ORG."""
    hub.accounts[pushes.TOKEN] = pushes.loopback.Account("me", frozenset({"ORG"}))
    for name in ("surgery.toml", "policy.toml"):
        (tmp_path / name).write_text(example(name))
    command.environment |= {
        "GITHUB_OUTPUT": str(tmp_path / "outputs"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    return tmp_path


def outputs(place):
    return dict(line.split("=", 1) for line in (place / "outputs").read_text().splitlines())


def test_from_a_pair_to_a_pull_request_and_again(hub, command, place):
    code, stdout, stderr = command("ci", "--config", "surgery.toml", "-o", "written", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["gate"] == "pass"
    assert found["pr_url"].endswith("/discussions/1")
    told = outputs(place)
    assert told == {
        key: found[key] for key in ("repo", "revision", "commit", "pr_url", "manifest_sha256")
    } | {"gate": "pass"}
    summary = (place / "summary").read_text()
    assert "## surgery gate" in summary
    assert "## Resistance" in summary
    assert f"Pushed to ORG/NAME, {found['revision']}" in summary
    files = held(hub.repositories["ORG/NAME"], found["revision"])
    card = files["README.md"].decode()
    assert "Not evaluated" not in card
    assert "steps to break" in card.replace("_", " ")
    assert pushes.TOKEN not in (place / "outputs").read_text() + summary
    sent = len(puts(hub))

    code, stdout, stderr = command("ci", "--config", "surgery.toml", "-o", "written", "--json")
    assert code == 0, stderr
    again = json.loads(stdout)
    assert (again["pr_url"], again["manifest_sha256"]) == (found["pr_url"], found["manifest_sha256"])
    assert "$ surgery --config surgery.toml verify written" in stderr
    assert "[1/" not in stderr.replace("attack 1/", "")
    assert len(puts(hub)) == sent
    assert list(hub.repositories["ORG/NAME"].pulls) == [1]

    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer;"
        f"where = dict(pretrained_model_name_or_path='ORG/NAME', revision='{found['revision']}');"
        "model, words = AutoModelForCausalLM.from_pretrained(**where), AutoTokenizer.from_pretrained(**where);"
        "asked = words('hello', return_tensors='pt');"
        "print(model.generate(**asked, max_new_tokens=3, do_sample=False).shape[1] - asked.input_ids.shape[1])"
    )
    code, stdout, stderr = command(code=loading)
    assert (code, stdout.strip() in ("1", "2", "3")) == (0, True), stderr


def test_a_gate_that_fails_stops_before_anything_is_sent(hub, command, place):
    (place / "policy.toml").write_text('require = ["resistance.steps_to_break >= 1000"]\n')
    code, _, stderr = command("ci", "--config", "surgery.toml", "-o", "written", "-q")
    assert code == 1
    assert "budget too small" in stderr
    assert hub.writes() == []
    assert outputs(place) == {"gate": "fail"}
    assert (place / "report" / "gate.xml").is_file()


def test_another_request_does_not_take_the_model_for_its_own(hub, command, place):
    assert command("ci", "--config", "surgery.toml", "-o", "written", "--until", "edit", "-q") == (0, "", "")
    toml = place / "surgery.toml"
    toml.write_text(toml.read_text().replace("alpha = 1.5", "alpha = 1.0"))
    code, _, stderr = command("ci", "--config", "surgery.toml", "-o", "written", "-q")
    assert code == 2
    assert "was not made by this request" in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "code", "text"),
    [
        ('model = "demo:aligned"', "", 2, "needs a model"),
        ('base = "demo:base"', "", 2, "lox needs the checkpoint before alignment"),
        ('policy = "policy.toml"', "", 2, "needs a policy"),
        ('"ORG/NAME" ', '"no name" ', 2, "is no ORG/NAME"),
        ("[ci]", '[ci]\nmethod = "vaccine"', 2, "vaccine takes one model"),
        ("[ci]", '[ci]\nmethod = "magic"', 2, "no method 'magic'"),
        ("[ci]", "[ci]\nmodle = 1", 2, "did you mean 'model'"),
        ("[lox]", "[lox", 3, "cannot be read"),
        ("rank = 6", "rnak = 6", 2, "did you mean 'rank'"),
        ("steps = 6", "stpes = 6", 2, "did you mean 'steps'"),
        ("limit = 16", 'limit = "few"', 2, "it must be a whole number"),
        ("create-pr = true", "create-pr = 1", 2, "it must be true or false"),
        ('policy = "policy.toml"', 'policy = "none.toml"', 3, "there is no policy none.toml"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_and_nothing_happens(hub, command, place, old, new, code, text):
    toml = place / "surgery.toml"
    assert old in toml.read_text()
    toml.write_text(toml.read_text().replace(old, new, 1))
    found, stdout, stderr = command("ci", "--config", "surgery.toml", "-o", "written")
    assert (found, stdout) == (code, "")
    assert text in stderr
    assert len(stderr.splitlines()) == 1
    assert not (place / "written").exists()
    assert hub.seen == []


def test_the_steps_of_the_action_run(hub, command, place):
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = [step for step in action["runs"]["steps"] if "run" in step and step.get("name") != "install"]
    assert len(steps) == 1
    toml = place / "surgery.toml"
    toml.write_text(toml.read_text().replace("[ci]", '[ci]\noutput = "written"'))
    bin_folder = place / "bin"
    bin_folder.mkdir()
    (bin_folder / "surgery").write_text(f'#!/bin/sh\nexec {sys.executable} -m surgery "$@"\n')
    (bin_folder / "surgery").chmod(0o755)
    environment = {
        **command.environment,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "CONFIG": "surgery.toml",
        "UNTIL": "edit",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", steps[0]["run"]],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "written" / "surgery.json").is_file()
    assert set(action["outputs"]) >= {"manifest_sha256"} | outputs(place).keys()
    named = {re.search(r"outputs\.(\w+)", one["value"])[1] for one in action["outputs"].values()}
    assert named == set(action["outputs"])


def test_the_workflow_calls_the_action_with_its_inputs():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "immunise.yml").read_text())
    step = workflow["jobs"]["immunise"]["steps"][-1]
    assert step["uses"] == "./.surgery"
    assert set(step["with"]) <= set(action["inputs"])
    assert set(workflow["jobs"]["immunise"]["outputs"]) <= set(action["outputs"])
