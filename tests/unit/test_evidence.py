"""The evidence study: what its ledger keeps, what its page says, and that a change of either is noticed."""

import copy
import dataclasses
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from ledgers import LOX, done, evaluated, filled, harmful, mean, put, searched, trial

from benchmarks.evidence import (
    columns,
    facts,
    hours,
    keys,
    page,
    plot,
    repeating,
    searching,
    sentences,
    study,
)
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.grounds import DEMO, GROUNDS, REAL, SEARCH
from benchmarks.evidence.keys import BUILD, Keys
from benchmarks.evidence.ledger import Ledger, dumped
from benchmarks.evidence.rows import ANEW, CONDITIONED, NONE, REROUTED, ROWS, SFT, named
from surgery import methods
from surgery.methods.vaccine import Vaccine
from surgery.train import data

# Columns with a table of their own.
OPTIONAL = ("mixed", "openings", "reach")


@pytest.fixture
def ledger(tmp_path):
    return filled(tmp_path / "evidence.json")


def test_a_ledger_comes_back_as_it_was_kept_and_knows_cells_by_their_key(ledger):
    again = Ledger(ledger.path)
    assert again.document == ledger.document
    key = ledger.cell("demo", LOX, "harmful")["key"]
    assert again.cell("demo", LOX, "harmful", key) == ledger.cell("demo", LOX, "harmful")
    assert again.cell("demo", LOX, "harmful", "another key") is None
    assert again.cell("demo", "tar", "harmful") is None


def test_one_ground_is_forgotten_and_the_other_is_not(ledger):
    ledger.put("real", NONE, BUILD, done({}))
    ledger.forget("demo")
    assert Ledger(ledger.path).cell("demo", LOX, "harmful") is None
    assert Ledger(ledger.path).cell("real", NONE, BUILD) is not None


def test_a_failed_cell_counts_as_not_there(ledger):
    put(ledger, LOX, "harmful", {"state": "failed", "key": "k", "error": "no memory"})
    assert ledger.cell("demo", LOX, "harmful") is None
    assert "*failed*" in page.page(ledger)


@pytest.mark.parametrize(
    "content", [{}, {"a": [1, 2]}, {"a": {"b": [[1, 0.5], [2, None]], "c": []}, "d": "x" * 200}]
)
def test_the_spelling_of_a_ledger_is_json(content):
    assert json.loads(dumped(content)) == content


def test_nan_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        dumped({"a": math.nan})


def test_a_slow_down_is_the_geometric_mean_of_ratios_of_equal_attacks(ledger):
    found = Facts(ledger, "demo").slowdown(LOX)
    # By the straight line between looks: from 3 to 6 and from 6 to 12 steps.
    assert found.value == pytest.approx(2.0)
    assert (found.n, found.unbroken) == (9, 0)
    assert found.low <= found.value <= found.high


def test_attacks_are_compared_with_their_equals_alone(ledger):
    figures = ledger.cell("demo", LOX, "harmful")["figures"]
    figures["trials"] = [trial(16, lr=1e-4), *figures["trials"][:1]]
    assert Facts(ledger, "demo").slowdown(LOX).n == 1


def test_a_model_that_was_not_broken_counts_at_its_last_step_and_says_so(ledger):
    figures = ledger.cell("demo", LOX, "harmful")["figures"]
    figures["trials"] = [trial(None)]
    found = Facts(ledger, "demo").slowdown(LOX)
    assert found.value == pytest.approx(32 / 3)
    assert found.unbroken == 1
    assert sentences.slow(found) == "> 10.67 (n 1)"


def test_seeds_of_one_setting_are_drawn_together(ledger):
    """Three settings at ratios of 1, 2 and 4, in ten seeds each: one setting more or less is what is uncertain."""
    for row, factors in ((NONE, (1, 1, 1)), (LOX, (1, 2, 4))):
        trials = [
            trial(4 * factor, lr=rate, seed=seed)
            for rate, factor in zip((1e-4, 1e-3, 1e-2), factors, strict=True)
            for seed in range(10)
        ]
        ledger.cell("demo", row, "harmful")["figures"]["trials"] = trials
    found = Facts(ledger, "demo").slowdown(LOX)
    assert (found.n, found.settings) == (30, 3)
    assert found.value == pytest.approx(2)
    # Student's, two degrees of freedom: 4.303 times ln 2 / sqrt(3). Thirty independent attacks would give 1.6 to 2.5.
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert found.least == pytest.approx(1)
    assert not found.slower


def test_of_one_or_two_settings_the_range_is_told_and_no_interval():
    few = facts.Slowdown(1.5, 1.4, 1.6, 1.4, 2, 0, 1, (1.3, 1.7))
    assert sentences.slow(few) == "1.50 (each 1.40 to 1.60, n 2)"
    assert not few.slower
    enough = dataclasses.replace(few, settings=3)
    assert sentences.slow(enough) == "1.50 (1.40 to 1.60, n 2)"
    assert enough.slower
    assert dataclasses.replace(enough, looks=(1.0, 1.7)).between
    sooner = dataclasses.replace(enough, value=0.7, low=0.6, high=0.8, least=0.6, looks=(0.5, 1.0))
    assert sooner.between
    assert dataclasses.replace(sooner, looks=(0.5, 0.9)).faster


def test_attacks_that_were_cut_off_tell_a_row_apart_only_where_every_setting_does():
    found = facts.Slowdown(3.0, 2.0, 4.0, 0.9, 6, 2, 3, (2.0, 4.0))
    assert not found.slower
    assert dataclasses.replace(found, least=1.1).slower
    assert dataclasses.replace(found, unbroken=0).slower


def test_what_differs_between_looks_alone_is_no_difference(ledger):
    """Both break at the second look; the line between looks puts one a little later."""
    early = [[0, 0.0, 1, 0], [4, 0.9, 1, 0]]
    late = [[0, 0.0, 1, 0], [4, 0.7, 1, 0]]
    for row, points in ((NONE, early), (LOX, late)):
        ledger.cell("demo", row, "harmful")["figures"]["trials"] = [
            {**trial(4, lr=rate), "points": points} for rate in (1e-4, 1e-3, 1e-2)
        ]
    found = Facts(ledger, "demo").slowdown(LOX)
    assert found.low > 1
    assert found.looks == (1, 1)
    assert found.between
    assert not found.slower


def test_cells_of_many_threads_are_all_kept(tmp_path):
    kept = Ledger(tmp_path / "evidence.json")
    with ThreadPoolExecutor(8) as pool:
        for number in range(64):
            pool.submit(kept.put, "demo", "row", f"column-{number}", done({}))
    assert len(Ledger(kept.path).ground("demo")["rows"]["row"]) == 64


def test_a_row_of_old_and_a_search_without_its_unedited_trial_do_not_stop_the_page(ledger):
    ledger.put("demo", "of-old", "harmful", ledger.cell("demo", LOX, "harmful"))
    found = {"judge": "x", "trials": [searched(6, 1.5, 2, layers="2:4")]}
    put(ledger, SEARCH, "search-1", done(found))
    assert "of-old" not in page.page(ledger)


def test_between_two_looks_the_break_is_where_the_line_reaches_the_threshold():
    half = {"broken_at": 8, "points": [[0, 0.0, 1, 0], [4, 0.25, 1, 0], [8, 0.75, 1, 0]]}
    assert facts.broken(half, 0.5) == pytest.approx(6.0)
    assert 0 < facts.broken({"broken_at": 0, "points": [[0, 0.9, 1, 0]]}, 0.5) < 1


def test_cost_is_told_in_runs_of_plain_fine_tuning(ledger):
    found = Facts(ledger, "demo")
    assert found.cost(named(LOX), "wall") == pytest.approx(2.0)
    assert found.cost(named(NONE), "wall") is None
    put(ledger, "vaccine", BUILD, done({}, wall=30.0))
    put(ledger, "vaccine+lox", BUILD, done({}, wall=5.0))
    assert Facts(ledger, "demo").cost(named("vaccine+lox"), "wall") == pytest.approx(3.5)


def absent(text):
    """The titles of rows that a table of a page has nothing of, table by table."""
    told = [line.removeprefix("*not run*: ") for line in text.splitlines() if line.startswith("*not run*: ")]
    return [line.rstrip(".").split("; ") for line in told]


def test_the_page_marks_what_was_not_run(ledger):
    put(ledger, "booster", BUILD, done({}, wall=5.0))
    text = page.page(ledger)
    assert "| TAR |" not in text
    assert sum("TAR" in titles for titles in absent(text)) == 2 * len(GROUNDS) + 1
    shown = [line for line in text.splitlines() if line.startswith("| Booster |")]
    assert ["*not run*" in line for line in shown] == [True]
    first = absent(text)[0]
    assert "TAR" in first
    assert "No defence" not in first


def test_the_page_says_how_long_it_takes_from_nothing(ledger):
    before = hours.from_nothing(DEMO, Facts(ledger, "demo").known, 2)
    put(ledger, "vaccine", BUILD, done({}, wall=3600.0))
    told = "".join(page._made(ledger, Facts(ledger, "demo")))
    assert f"in the order they run, {before + 1:.1f} hours from nothing" in told


def test_every_row_and_every_ground_is_on_the_page(ledger):
    text = page.page(ledger)
    for ground in GROUNDS.values():
        assert f"## {ground.title}" in text
    for row in ROWS:
        here = [name for name, ground in GROUNDS.items() if row.name in itertools.chain(*ground.waves)]
        covered = [
            sum(column.covers(row.name, ground) for column in columns.COLUMNS if column.name in OPTIONAL)
            for ground in here
        ]
        assert here
        found = text.count(f"| {row.title} |") + sum(row.title in titles for titles in absent(text))
        assert found == 2 * len(here) + sum(covered)


def test_a_page_that_is_not_the_ledgers_is_noticed(ledger, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    monkeypatch.setattr(plot, "FILE", tmp_path / "evidence.svg")
    page.README.write_text(f"before\n{page.BEGIN}\n{page.END}\nafter\n")
    page.write(ledger)
    assert page.check(ledger) == 0
    assert page.README.read_text().startswith("before\n")
    assert page.README.read_text().endswith("after\n")
    first = plot.FILE.read_bytes()
    page.write(ledger)
    assert plot.FILE.read_bytes() == first
    ledger.cell("demo", LOX, "harmful")["figures"]["trials"][0] = trial(32)
    assert page.check(ledger) == 1
    told = capsys.readouterr().err
    assert all(name in told for name in ("docs/evidence.md", "README.md", "docs/evidence.svg"))


def test_a_readme_without_marks_is_refused(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    page.README.write_text("nothing\n")
    with pytest.raises(ValueError, match="needs"):
        page.check(ledger)


def test_the_loss_of_a_trial_that_ran_on_is_read_where_it_would_have_settled(ledger):
    """Of two looks in a row with all complied with, the later one is the last that counts."""
    points = [[0, 0.0, 2.0, 0.0], [2, 1.0, 0.5, 0.0], [4, 1.0, 0.4, 0.0], [8, 1.0, 0.1, 0.0]]
    whole = {**trial(2), "points": points}
    assert facts.settled(points) == points[:3]
    assert facts.settled(points[:2]) == points[:2]
    put(ledger, NONE, "harmful", done(harmful([whole])), REAL)
    assert Facts(ledger, "real").loss_there(NONE)["value"] == 0.4
    put(ledger, NONE, "harmful", done(harmful([{**whole, "points": points[:3]}])), REAL)
    assert Facts(ledger, "real").loss_there(NONE) == mean(0.01)


def test_the_page_says_so_where_cells_are_of_two_kinds_of_machine(ledger):
    assert "whose arithmetic" not in page.page(ledger)
    for row, kind in ((NONE, "one"), (LOX, "other")):
        ledger.cell("demo", row, "benign")["processor"] = kind
    assert (
        "Cells by the processor they were measured on, whose arithmetic rounds differently: one 1; other 1."
        in (page.page(ledger))
    )


@pytest.mark.parametrize("ground", [DEMO, REAL], ids=lambda ground: ground.name)
def test_every_row_is_in_one_wave_after_what_it_starts_from(ground):
    order = [name for wave in ground.waves for name in wave]
    # There is nothing to hold back on the embedded pair, and there is no time on the other to align the base anew.
    left_out = [REROUTED[1], CONDITIONED[0]] if ground is DEMO else [ANEW, "vaccine-anew", "t-vaccine-anew"]
    rows = [row for row in ROWS if row.name not in left_out]
    assert sorted(order) == sorted([*ground.searches, *(row.name for row in rows)])
    for row in rows:
        assert row.name == NONE or order.index(row.beside) < order.index(row.name)
        if row.on is not None:
            assert order.index(row.on) < order.index(row.name)


def test_keys_change_with_what_a_cell_depends_on(ledger, monkeypatch):
    keys, row = Keys(DEMO, ledger, "demo"), named("vaccine+lox")
    assert keys.row(row, "mixed") != keys.row(row, "benign")
    found = {keys.row(row, column) for column in (BUILD, "harmful", "benign", "evaluate")}
    assert len(found) == 4
    assert Keys(DEMO, ledger, "other data").row(row, BUILD) not in found
    assert keys.row(named("vaccine"), BUILD) not in found
    before = keys.row(row, "harmful")
    monkeypatch.setitem(Vaccine.presets["small"], "lr", 0.5)
    assert keys.row(row, "harmful") != before  # by what it starts from
    assert keys.row(named(LOX), "harmful") == ledger.cell("demo", LOX, "harmful")["key"]


@pytest.mark.parametrize("row", [name for name in REAL.training if name != SFT])
def test_a_trained_row_gets_the_data_that_its_method_uses_and_no_other(ledger, row):
    words = [*Keys(REAL, ledger, "x").words(named(row))]
    given = {name: REAL.data[name] for name in REAL.data if f"--{name}-data" in words}
    method = methods.get(named(row).method)
    assert set(data.choose(method(), "aligned", given)) == set(given)


def test_a_cell_of_another_study_counts_as_not_run(ledger):
    ledger.put("demo", LOX, "harmful", {**ledger.cell("demo", LOX, "harmful"), "key": "of old"})
    found = Facts(ledger, "demo")
    assert found.cell(LOX, "harmful") is None
    assert found.cell(LOX, "evaluate") is not None
    line = next(line for line in page.page(ledger).splitlines() if line.startswith(f"| {named(LOX).title} "))
    assert "*not run*" in line


def test_a_row_that_waits_for_the_search_counts_as_not_run(ledger):
    ledger.put("demo", "lox-best", "harmful", {**ledger.cell("demo", LOX, "harmful"), "key": "any"})
    assert Facts(ledger, "demo").cell("lox-best", "harmful") is None
    with pytest.raises(searching.NothingChosenError):
        Keys(DEMO, ledger, "demo").row(named("lox-best"), BUILD)


def test_a_row_that_comes_out_otherwise_is_noticed(ledger):
    known = ledger.ground("demo")["rows"][LOX]
    assert [*repeating.differences(known, known)] == []
    for change, named_in in (
        (
            lambda cells: cells["harmful"]["figures"].update(harmful([trial(32), trial(16, kind="full")])),
            "breaks it at",
        ),
        (lambda cells: cells["evaluate"]["figures"].update(evaluated(perplexity=2.0)), "perplexity_ratio"),
        (lambda cells: cells[BUILD].update(state="failed", error="no memory"), "no memory"),
        (lambda cells: cells.pop("evaluate"), "evaluate is missing"),
    ):
        other = copy.deepcopy(known)
        change(other)
        assert any(named_in in text for text in repeating.differences(known, other)), named_in
    none = copy.deepcopy(known)
    none["harmful"]["figures"]["trials"] = []
    assert [*repeating.differences(known, none)] == ["no attack was carried out"]
    later = copy.deepcopy(known)
    later["harmful"]["figures"]["trials"][0] = trial(64, looks=(0, 1, 2, 4, 8, 16, 32, 64))
    assert len([*repeating.differences(known, later)]) == 1
    near = copy.deepcopy(known)
    near["harmful"]["figures"]["trials"][0]["broken_at"] = 16
    assert [*repeating.differences(known, near)] == []


def test_where_only_the_figures_of_the_undefended_model_are_left_it_is_evaluated_for_others(
    ledger, tmp_path, monkeypatch
):
    said, ran = [], []
    column = [one for one in columns.COLUMNS if one.name == columns.EVALUATE]
    monkeypatch.setattr(study, "run", lambda words, *where: ran.append(words))
    again = study.Study(DEMO, ledger, tmp_path, 1, said.append, column)
    keys = Keys(DEMO, ledger, "demo")
    again._reference([named(LOX)], keys)
    assert ran == []  # its own figures are there
    again._reference([named("vaccine")], keys)
    [words] = ran
    output = words[-1]
    assert words[:3] == ["surgery", "evaluate", DEMO.aligned]
    assert "--reference" not in words
    assert output == f"{NONE}/measured-evaluate-{keys.row(named(NONE), columns.EVALUATE)}"
    (tmp_path / output / columns.KEPT).parent.mkdir(parents=True)
    (tmp_path / output / columns.KEPT).touch()
    again._reference([named("vaccine")], keys)
    assert len(ran) == 1
    [found] = column[0].commands(DEMO, "vaccine/model", "out", tmp_path)
    assert found[found.index("--reference-from") + 1] == output


def test_an_option_that_came_later_changes_no_key_until_it_is_used(ledger, monkeypatch):
    row = named("circuit-breakers")
    before = Keys(REAL, ledger, "x").row(row, "build")
    monkeypatch.setattr(keys, "_LATER", {})
    assert Keys(REAL, ledger, "x").row(row, "build") != before
    monkeypatch.undo()
    assert Keys(REAL, ledger, "x").row(named("circuit-breakers-sparing"), "build") != before
    monkeypatch.setattr(keys, "_LATER", {"spare": 0.5})
    assert Keys(REAL, ledger, "x").row(row, "build") != before
