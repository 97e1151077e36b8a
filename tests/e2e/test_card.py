"""An edit, its evaluation and the card, by the commands that a user types."""

import json

import pytest

from surgery.cli.app import main
from surgery.evaluate.report import by_condition
from surgery.pushing import outgoing

pytestmark = pytest.mark.slow


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    place = tmp_path_factory.mktemp("card")
    edited, report = place / "edited", place / "report"
    assert run("lox", "demo:base", "demo:aligned", "--rank", 6, "--alpha", 1.5, "-q", "-o", edited) in (
        0,
        None,
    )
    limits = ["--steps", 9, "--limit", 16, "--rows", 16, "--practice-steps", 12]
    assert run("evaluate", edited, "--reference", "demo:aligned", *limits, "-q", "-o", report) in (0, None)
    return edited, report


def test_the_card_tells_what_the_evaluation_measured(measured, capsys):
    edited, report = measured
    found = json.loads((report / "report.json").read_text())
    assert run("card", edited, "--report", report, "--json") in (0, None)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["evaluated"], shown["notes"]) == (True, [])
    text = (edited / "README.md").read_text()
    for rows in by_condition(found).values():
        for name, ours, theirs in rows:
            assert f"| {name} | {ours} | {theirs} |" in text
    assert "Not evaluated" not in text
    assert run("card", edited, "--report", report, "-q") in (0, None)
    assert (edited / "README.md").read_text() == text
    assert outgoing.gather(edited).files["README.md"].size == len(text.encode())


def test_a_report_on_the_parent_is_refused(measured, capsys, tmp_path):
    edited, report = measured
    found = json.loads((report / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**found, **found["reference"]}))
    before = (edited / "README.md").read_bytes()
    assert run("card", edited, "--report", tmp_path) == 3
    assert "is about another model" in capsys.readouterr().err
    assert (edited / "README.md").read_bytes() == before
