"""The searches of the evidence study: which settings they show, choose and go on with."""

import dataclasses
import json

import pytest
from ledgers import done, filled, put, searched

from benchmarks.evidence import page, search_claims, searching
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import DEMO, REAL, SEARCH, Search, search_of, search_on
from benchmarks.evidence.keys import Keys
from benchmarks.evidence.rows import named

TRIALS = [
    searched(6, 0.0, 6),
    searched(6, 1.5, 14),
    searched(6, 2.0, 28, exclude="layers"),
    searched(6, 3.0, None, perplexity=1.5),
    searched(12, 2.0, 28, loss=0.05),
    searched(3, 2.0, 40, over_refusal=0.2),
]


@pytest.fixture
def ledger(tmp_path):
    return filled(tmp_path / "evidence.json")


def test_the_best_setting_is_the_slowest_that_can_be_afforded():
    assert searching.best(TRIALS)["params"]["exclude"] == "layers"
    assert searching.unedited(TRIALS)["params"]["alpha"] == 0
    with pytest.raises(searching.NothingChosenError):
        searching.best([TRIALS[0], TRIALS[3]])
    with pytest.raises(searching.NothingChosenError):
        searching.best(TRIALS[1:])


def test_the_front_has_what_nothing_beats():
    kept = [trial["params"] for trial in searching.front(TRIALS)]
    assert TRIALS[3]["params"] in kept
    assert TRIALS[2]["params"] in kept
    assert TRIALS[1]["params"] not in kept
    assert TRIALS[0]["params"] not in kept


def test_a_row_for_which_a_whole_search_chose_nothing_says_so(ledger):
    name = search_on("circuit-breakers")
    title = named("circuit-breakers+lox-best").title
    put(ledger, name, "search-0", done({"judge": "x", "trials": [searched(6, 0.5, 3, perplexity=1.5)]}))
    assert "*not made*" not in page.page(ledger)
    put(ledger, name, "search-1", done({"judge": "x", "trials": [searched(6, 0.0, 0)]}))
    told = page.page(ledger).partition(f"## {REAL.title}")[0].splitlines()
    assert f"*not made*: {title} (no setting of the search keeps to the bounds)." in told
    assert not any(line.startswith("*not run*") and title in line for line in told)
    assert any(line.startswith("| unedited | 0 |") for line in told)
    affordable = {"judge": "x", "trials": [searched(6, 0.0, 0), searched(6, 0.1, 3)]}
    put(ledger, name, "search-1", done(affordable))
    assert "*not made*" not in page.page(ledger)


def test_a_setting_is_found_by_its_parameters_and_no_others():
    assert searching.trial_of(TRIALS, rank=6, alpha=2.0) is None
    assert searching.trial_of(TRIALS, rank=6, alpha=2.0, exclude="layers") is TRIALS[2]
    assert searching.trial_of(TRIALS, rank=6, alpha=1.5, anchor="aligned") is TRIALS[1]


def test_what_a_search_says_of_places_and_depth_is_in_its_trials(ledger):
    assert search_claims.places(Facts(ledger, "demo")) is None
    assert search_claims.depth(Facts(ledger, "demo")) is None
    trials = [
        *TRIALS[:2],
        searched(6, 1.5, 2, layers="2:4"),
        searched(6, 1.5, 8, include="embed"),
        searched(6, 1.5, 20, depth="0:0.5", perplexity=0.98),
    ]
    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": trials}))
    found = Facts(ledger, "demo")
    assert "layers 2:4: 2 steps" in search_claims.places(found)
    assert "over-refusal 0%): layers 2:4. By the" in search_claims.places(found)
    assert (
        "depth 0:0.5: 20 steps at perplexity x 0.980, over-refusal 0%, all layers 14 steps"
        in search_claims.depth(found)
    )


def test_a_trained_method_is_held_at_every_strength_against_the_undefended_model(ledger):
    def rho(value, steps):
        return {**searched(0, 1.0, steps), "params": {"rho": value}}

    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": TRIALS[:2]}))
    assert search_claims.strength(Facts(ledger, "demo")) is None
    for method, steps in (("vaccine", (3, 6, 5)), ("t-vaccine", (3, 9, 5))):
        trials = [rho(value, taken) for value, taken in zip((2, 8, 32), steps, strict=True)]
        put(ledger, search_of(method), "search-0", done({"judge": "x", "trials": trials}))
    found = Facts(ledger, "demo")
    assert "Vaccine: 6 steps at perplexity x 1.000, over-refusal 0% (of 3)" in search_claims.strength(found)
    assert "a look later than undefended: Vaccine. The latest" in search_claims.strength(found)
    assert "| rho 8 | 9 | " in page.page(ledger)


def test_the_chosen_setting_becomes_the_options_of_the_command(ledger):
    put(ledger, SEARCH, "search-0", done({"judge": "x", "trials": TRIALS}))
    trials = searching.trials(Keys(DEMO, ledger, "demo").current_searches())
    assert [*searching.chosen(trials)] == ["--rank", "6", "--alpha", "2", "--exclude", "layers"]


def test_a_sweep_names_the_base_it_is_made_for_and_its_key_changes_with_it(ledger):
    sweeps = (("--rank", "6"), ("cleaned", "--rank", "6"))
    made = {"cleaned": ("python", "-m", "x", "--share", "0.5")}
    ground = dataclasses.replace(REAL, searches={SEARCH: Search(sweeps)}, bases=made)
    keys = Keys(ground, ledger, "x")
    assert keys.search_words(SEARCH, 0)[:6] == ["surgery", "sweep", "lox", "base", "aligned", "--rank"]
    assert keys.search_words(SEARCH, 1)[:6] == ["surgery", "sweep", "lox", "cleaned", "aligned", "--rank"]
    assert [keys.search_base(SEARCH, number) for number in (0, 1)] == ["", "cleaned"]
    other = Keys(dataclasses.replace(ground, bases={"cleaned": ("python", "-m", "y")}), ledger, "x")
    assert other.search(SEARCH, 0) == keys.search(SEARCH, 0)
    assert other.search(SEARCH, 1) != keys.search(SEARCH, 1)


def test_trials_of_a_sweep_say_which_base_they_were_made_for(tmp_path):
    trials = [{"params": {"rank": 6, "alpha": 2.0}, "scores": {}, "error": None}]
    (tmp_path / "sweep.json").write_text(json.dumps({"judge": "x", "trials": trials}))
    assert searching.read(tmp_path)["trials"][0]["params"] == {"rank": 6, "alpha": 2.0}
    assert searching.read(tmp_path, "cleaned")["trials"][0]["params"]["base"] == "cleaned"


def test_every_base_that_a_search_names_is_made():
    named = {sweep[0] for search in REAL.searches.values() for sweep in search.sweeps if sweep[0][0] != "-"}
    assert named == set(REAL.bases)
