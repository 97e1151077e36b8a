"""What trials are called: by what tells them apart, what they have in common being told once."""

import pytest

from surgery.pages import figures
from surgery.sweeping import page, report
from surgery.sweeping.labels import common, label, labels


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"rank": 6, "alpha": 1.5, "anchor": "aligned"}, "r6 a1.5"),
        ({"rank": "full", "alpha": 2.0, "anchor": "base", "layers": "0:2"}, "rfull a2 base, layers 0:2"),
        ({"rho": 0.5, "steps": 20}, "rho 0.5, steps 20"),
        ({}, "as it is"),
    ],
)
def test_trials_are_called_by_what_they_try(params, text):
    assert label(params) == text


LOX = [{"rank": 6, "alpha": alpha, "anchor": "aligned", "exclude": "embed"} for alpha in (0.0, 1.5)]
TRAINED = [{"lam": lam, "steps": 60, "lr": 5e-4} for lam in (1.0, 2.0)]


@pytest.mark.parametrize(
    ("trials", "names", "same"),
    [
        (TRAINED, ["lam 1", "lam 2"], "steps 60, lr 0.0005"),
        (TRAINED[:1], ["lam 1, steps 60, lr 0.0005"], ""),
        (LOX, ["r6 a0", "r6 a1.5"], "exclude embed"),
        ([TRAINED[0], {"steps": 60}], ["lam 1, lr 0.0005", "as it is"], "steps 60"),
        (
            [TRAINED[0], {"lam": 3.0, "steps": 70, "lr": 1.0}],
            ["lam 1, steps 60, lr 0.0005", "lam 3, steps 70, lr 1"],
            "",
        ),
        ([], [], ""),
    ],
)
def test_what_all_trials_have_in_common_is_told_once(trials, names, same):
    assert labels(trials) == (names, same)


def test_a_value_of_none_is_not_that_of_a_field_that_is_not_there():
    assert common([{"layers": None, "rho": 1}, {"rho": 2}]) == {}
    assert common([{"layers": None, "rho": 1}, {"layers": None, "rho": 2}]) == {"layers": None}


def found(params):
    score = {"value": 0.5, "n": 4}
    scores = {
        "resistance.harmful_loss": score,
        "stability.perplexity_ratio": score,
        "stability.over_refusal": score,
    }
    told = {
        "method": "vaccine",
        "model": "demo:aligned",
        "n": 4,
        "judge": "phrases",
        "rate": "asr",
        "objectives": ["a"],
    }
    return told | {
        "trials": [{"params": one, "scores": scores, "front": True, "figures": {}} for one in params]
    }


@pytest.mark.parametrize(("params", "told"), [(TRAINED, True), (TRAINED[:1], False)])
def test_table_and_page_say_it_before_the_trials(params, told):
    lines = list(report.table(found(params)))
    assert (lines[0] == "all with steps 60, lr 0.0005") == told
    assert [line.split("  ")[0].strip() for line in lines if line.startswith("* lam")] == [
        f"* {name}" for name in labels(params)[0]
    ]
    assert len({len(line) for line in lines[told:-1]}) == 1
    if figures.available():
        assert ("All with steps 60, lr 0.0005." in (page.render(found(params)) or "")) == told
