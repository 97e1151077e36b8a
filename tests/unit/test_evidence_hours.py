"""How long the evidence study takes from nothing: schedules worked out by hand."""

import dataclasses

import pytest
from ledgers import LOX

from benchmarks.evidence import hours
from benchmarks.evidence.grounds import DEMO, SEARCH
from benchmarks.evidence.keys import BUILD
from benchmarks.evidence.rows import NONE


# Models of 1, 1 and 2 hours end after 3 side by side, the longest being last; a search of one sweep leaves a process
# idle; and 2 hours of measuring run beside 1 and 1.
@pytest.mark.parametrize(
    ("one_by_one", "processes", "expected"),
    [(True, 2, 4 + 1 + 2), (False, 2, 3 + 1 + 2), (False, 1, 4 + 1 + 4)],
)
def test_hours_from_nothing_are_those_of_the_schedule(one_by_one, processes, expected):
    ground = dataclasses.replace(
        DEMO, one_by_one=one_by_one, waves=((SEARCH, NONE, LOX, "vaccine"), ("tar",))
    )
    hour, two = {"wall": 3600.0}, {"wall": 7200.0}
    known = {
        SEARCH: {"search-0": hour},
        NONE: {BUILD: hour, "harmful": hour},
        LOX: {BUILD: hour, "harmful": two},
        "vaccine": {BUILD: two, "benign": hour, "evaluate": {"state": "failed"}},
        "booster": {BUILD: two},
    }
    assert hours.from_nothing(ground, known, processes) == expected


def test_what_a_wave_waits_for_is_counted():
    apart, together = ((NONE,), ("vaccine",)), ((NONE, "vaccine"),)
    known = {name: {"harmful": {"wall": 3600.0}} for name in (NONE, "vaccine")}
    for waves, expected in ((apart, 2.0), (together, 1.0)):
        assert hours.from_nothing(dataclasses.replace(DEMO, waves=waves), known, 2) == expected
