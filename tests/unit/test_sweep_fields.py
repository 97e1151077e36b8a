"""Lists of values for fields, as `--set` spells them, and how trials are called."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_doc import Doc

from surgery.errors import UsageError
from surgery.methods.lox import LoX
from surgery.sweeping.fields import lists, product


@dataclass(frozen=True)
class Record:
    rho: Annotated[float, Doc("")] = 2.0
    steps: int = 100
    layers: str | None = None
    form: Literal["paper", "tutorial"] = "paper"
    full: bool = False
    rank: Annotated[int | Literal["auto"], Doc("")] = 6


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("rho=1,2.5,4", "rho", [1.0, 2.5, 4.0]),
        ("rho=0.5:2:0.5", "rho", [0.5, 1.0, 1.5, 2.0]),
        ("rho=1,1", "rho", [1.0]),
        ("steps=20:40:10", "steps", [20, 30, 40]),
        (" steps = 5", "steps", [5]),
        ("layers=0:2,2:4,none", "layers", ["0:2", "2:4", None]),
        ("form=paper,tutorial", "form", ["paper", "tutorial"]),
        ("full=true,false", "full", [True, False]),
        ("rank=1,auto", "rank", [1, "auto"]),
    ],
)
def test_values_have_the_type_of_their_field(text, name, values):
    found = lists([text], [Record])
    assert found == {name: values}
    assert [type(value) for value in found[name]] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rho"], "FIELD=VALUES"),
        (["rho="], "FIELD=VALUES"),
        (["rohe=1"], "no field here; there are form, full"),
        (["rho=1", "rho=2"], "rho twice"),
        (["rho=fast"], "rho has 'fast'"),
        (["steps=1.5"], "whole numbers"),
        (["steps=1,,2"], "steps is empty"),
        (["form=printed"], "one of paper, tutorial"),
        (["full=yes"], "one of true, false"),
        (["layers="], "FIELD=VALUES"),
    ],
)
def test_what_is_no_list_of_values_is_refused(texts, message):
    with pytest.raises(UsageError, match=message):
        lists(texts, [Record])


def test_fields_of_a_method_are_found_by_either_spelling():
    assert lists(["split-fused=true"], [LoX]) == {"split_fused": [True]}


def test_every_combination_is_tried_the_first_field_outermost():
    found = product(lists(["rho=1,2", "steps=3,4"], [Record]))
    assert found == [{"rho": a, "steps": b} for a in (1.0, 2.0) for b in (3, 4)]
    assert product({}) == [{}]
