"""What an evaluation found of a model is kept, and taken only for the same model, data and options."""

import json

import pytest

from surgery.attacking.settings import Budget
from surgery.errors import InputError, UsageError
from surgery.evaluate import keeping
from surgery.evaluate.evaluation import evaluate
from surgery.evaluate.suites import Measuring

pytestmark = pytest.mark.usefixtures("one_thread")

MEASURING = Measuring(rows=8, practice_steps=2, practice_seeds=1, inside=False)
SHORT = {"attacks": "prefill", "limit": 6, "kinds": "lora", "learning_rates": "1e-3", "steps": 1, "every": 1}
BUDGET = Budget(max_new_tokens=8, **SHORT)


def measured(model, output, **changed):
    return evaluate(model, **{"output": output, "measuring": MEASURING, "budget": BUDGET, **changed})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The output and the report of the reference by itself."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, measured("demo:aligned", folder)


@pytest.fixture
def no_measuring(monkeypatch):
    """Every attempt to measure a model fails."""

    def refuse(subject, *_, **__):
        raise AssertionError(f"{subject.ground.source.label} is measured")

    monkeypatch.setattr(keeping, "assess", refuse)


def test_a_report_is_the_same_with_the_figures_of_a_reference_measured_before(alone, tmp_path, monkeypatch):
    whole = measured("demo:base", tmp_path / "whole", reference="demo:aligned")
    seen, assess = [], keeping.assess

    def counted(subject, *args, **named):
        seen.append(subject.ground.source.label)
        return assess(subject, *args, **named)

    monkeypatch.setattr(keeping, "assess", counted)
    short = measured("demo:base", tmp_path / "short", reference="demo:aligned", reference_from=alone[0])
    assert seen == ["demo:base"]
    assert json.loads(json.dumps(short)) == json.loads(json.dumps(whole))
    assert short["metrics"]["stability.perplexity_ratio"]["value"] != 1


def test_an_evaluation_that_has_ended_is_not_measured_again(alone, no_measuring):
    assert json.loads(json.dumps(measured("demo:aligned", alone[0]))) == json.loads(json.dumps(alone[1]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"budget": Budget(max_new_tokens=9, **SHORT)}, "budget"),
        ({"measuring": Measuring(rows=7, practice_steps=2, practice_seeds=1, inside=False)}, "data, options"),
        ({"seed": 1}, "seed"),
        ({"reference": "demo:base"}, "model"),
    ],
)
def test_figures_of_something_else_are_refused_by_name_before_anything_is_measured(
    alone, tmp_path, no_measuring, changed, named
):
    before = (alone[0] / "model" / keeping.FILE).read_bytes()
    given = {"reference": "demo:aligned", "reference_from": alone[0], **changed}
    with pytest.raises(InputError, match=named):
        measured("demo:aligned", tmp_path, **given)
    assert (alone[0] / "model" / keeping.FILE).read_bytes() == before


def test_an_output_with_nothing_finished_is_refused(tmp_path, no_measuring):
    with pytest.raises(InputError, match="nothing finished"):
        measured(
            "demo:aligned", tmp_path / "one", reference="demo:aligned", reference_from=tmp_path / "other"
        )
    assert list(tmp_path.iterdir()) == []


def test_figures_of_no_reference_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--reference as well"):
        measured("demo:aligned", tmp_path, reference_from=tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"identity": {}}'])
def test_what_cannot_be_read_is_measured_again(alone, tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / keeping.FILE).write_text(text)
    found = measured("demo:aligned", tmp_path)
    assert found["metrics"] == alone[1]["metrics"]
    assert json.loads((folder / keeping.FILE).read_text())["identity"]
