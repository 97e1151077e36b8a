"""Studies that draw their trials, and the files and databases that studies are kept in."""

import json
import math
import sys

import pytest
import studies
from studies import die, numbers, planned

from surgery.errors import AccessError, InputError, UsageError
from surgery.studying import Study, storages

place = studies.place
opened = studies.opened
dead = studies.dead


SPACE = {"lr": ("log", 1e-6, 1e-1), "rank": ("int", 1, 32), "kind": ["lora", "full"], "batch": (4, 8, 16)}


def searched(study, count, seed=3, space=SPACE, value=lambda params: -abs(math.log10(params["lr"]) + 2.5)):
    study.search(space, count, seed)
    found = []
    while (trial := study.claim()) is not None:
        found.append(trial.params)
        trial.finish({}, [value(trial.params)])
    return found


def test_a_search_draws_so_many_trials_from_its_space(opened):
    study = opened()
    found = searched(study, 12)
    assert len(found) == 12
    assert [one.params for one in opened().finished()] == found
    assert all(1e-6 <= params["lr"] <= 1e-1 and 1 <= params["rank"] <= 32 for params in found)
    assert {params["kind"] for params in found} == {"lora", "full"}
    assert {params["batch"] for params in found} == {4, 8, 16}
    assert len({params["lr"] for params in found}) == 12
    assert {type(params["rank"]) for params in found} == {int}
    assert searched(opened(), 12) == []
    assert len(searched(opened(), 15)) == 3
    assert len(study.finished()) == 15


def test_a_search_is_the_same_for_the_same_seed(tmp_path):
    runs = [
        searched(Study.open(tmp_path / name, "s", identity={}), 14, seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_search_learns_from_what_was_found(tmp_path):
    def regret(value):
        study = Study.open(tmp_path / str(value is None), "s", identity={})
        options = {} if value is None else {"value": value}
        found = searched(study, 40, space={"lr": SPACE["lr"]}, **options)
        return sum(abs(math.log10(params["lr"]) + 2.5) for params in found[-15:]) / 15

    assert regret(None) < 0.6 * regret(lambda params: 0.0), "drawn at random where all is equally good"


def test_trials_without_a_number_do_not_stop_a_search(tmp_path):
    values = iter([math.nan, math.inf, -math.inf, *range(100)])
    study = Study.open(tmp_path, "s", identity={})
    study.add([{"a": 1}])
    assert len(searched(study, 16, value=lambda params: float(next(values)))) == 17
    assert len(study.finished()) == 17


def test_a_search_of_another_space_or_seed_is_refused(opened):
    searched(opened(), 2)
    with pytest.raises(InputError, match=r"its seed is 3, here it is 4"):
        opened().search(SPACE, 2, 4)
    with pytest.raises(InputError, match=r"its space\.lr is .*, here it is not given"):
        opened().search({"rank": SPACE["rank"]}, 2, 3)


def test_a_drawn_trial_whose_process_died_keeps_its_parameters(opened, dead):
    study = opened()
    study.search(SPACE, 1, 3)
    trial = study.claim()
    die(study, trial, dead)
    other = opened()
    assert other.claim() is None, "who does not search draws nothing"
    other.search(SPACE, 1, 3)
    again = other.claim()
    assert again.params == trial.params
    again.finish({}, [1.0])
    assert [one.params for one in other.finished()] == [trial.params]


@pytest.mark.parametrize("among", [[], ("log", 0.0, 1.0), ("log", 1.0, 0.1), ("int", 4, 4)])
def test_a_space_that_is_none_is_refused(tmp_path, among):
    with pytest.raises(UsageError, match="a search over x"):
        Study.open(tmp_path, "s", identity={}).search({"x": among}, 3, 0)


def test_choices_that_begin_like_a_range_are_choices(tmp_path):
    found = searched(
        Study.open(tmp_path, "s", identity={}),
        12,
        space={"x": ["log", "int", "lin"]},
        value=lambda params: 0.0,
    )
    assert {params["x"] for params in found} == {"log", "int", "lin"}


@pytest.fixture
def journal(tmp_path):
    """A journal with two trials, one done."""
    study = Study.open(tmp_path, "s", identity={})
    study.add(planned(2))
    study.claim().finish({"x": 1})
    return tmp_path / "study.journal"


@pytest.mark.parametrize(
    "line", [b"rubbish", b"\0\0\0\0", b"\xff\xfe", b"[]", b'{"op_code": "x"}', b"{}", b""]
)
def test_a_line_that_is_no_entry_is_named(journal, line):
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n")
    with pytest.raises(InputError, match=r"line 4 of .*study\.journal is damaged"):
        Study.open(journal.parent, "s", identity={})
    journal.write_bytes(b"\n".join(lines[:3]) + b"\n")
    Study.open(journal.parent, "s", identity={}).add(planned(2))


@pytest.mark.parametrize("entry", [{"op_code": 4}, {"op_code": 99}, {"op_code": 0, "study_name": "t"}])
def test_an_entry_that_means_nothing_is_refused(journal, entry):
    with journal.open("a") as file:
        file.write(json.dumps({**entry, "worker_id": "x"}) + "\n")
    with pytest.raises(InputError, match="no journal of a study"):
        Study.open(journal.parent, "s", identity={})


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_half_a_line_at_the_end_is_dropped_before_the_next_is_written(journal, lost):
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    with journal.open("ab") as file:
        file.write(last[:-lost])
    study, other = (Study.open(journal.parent, "s", identity={}) for _ in range(2))
    assert numbers(study) == [0]
    study.claim().finish({})
    assert numbers(other) == numbers(Study.open(journal.parent, "s", identity={})) == [0, 1]
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_half_a_line_would_be_in_the_way_if_it_were_left(journal, monkeypatch):
    monkeypatch.setattr("surgery.studying.journal._drop_half_line", lambda path: None)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    study = Study.open(journal.parent, "s", identity={})
    assert study.claim() is None, "a trial waits, but the claim was written to the end of the half line"
    with pytest.raises(InputError, match="damaged while it was in use"):
        study.add(planned(3))


def test_an_empty_journal_is_a_new_one(tmp_path):
    (tmp_path / "study.journal").touch()
    assert Study.open(tmp_path, "s", identity={}).claim() is None


def test_what_is_no_database_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "_OPENINGS", 2)
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)
    cases = [
        (f"sqlite:///{tmp_path}/study.db", InputError, "is no database for studies"),
        (f"sqlite:///{tmp_path}/nowhere/study.db", AccessError, "does not answer"),
        ("nonsense://user:secret@host/db", UsageError, "nonsense://"),
        ("postgresql+nodriver://user:secret@host/db", UsageError, "postgresql"),
        ("sqlite://user:secret@host:x/db", UsageError, "no URL of a database"),
    ]
    for url, error, match in cases:
        with pytest.raises(error, match=match) as told:
            Study.open(url, "s", identity={})
        assert "secret" not in str(told.value)
        assert "\n" not in str(told.value)


def test_a_database_that_fails_in_mid_study_is_told_in_one_line(tmp_path):
    study = Study.open(f"sqlite:///{tmp_path}/study.db", "s", identity={})
    study.add(planned(1))
    trial = study.claim()
    (tmp_path / "study.db").write_bytes(b"overwritten" * 1000)
    with pytest.raises((InputError, AccessError)):
        trial.finish({})
    with study._storage.forgiving():
        study.finished()


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'model-surgery\[study\]'"):
        Study.open(tmp_path, "s", identity={})


def test_nothing_is_printed(opened, capfd):
    searched(opened(), 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("locks", [True, False])
def test_sqlite_locks_before_it_reads(tmp_path, monkeypatch, locks):
    """What a state is set upon was read under the lock; without, two processes could set it upon the same reading."""
    monkeypatch.setattr(storages, "_PATIENCE", 0.1)
    if not locks:
        monkeypatch.setattr(storages, "_serialise", lambda engine: None)
    one, other = (storages.open_storage(f"sqlite:///{tmp_path}/study.db", "s", create=True) for _ in range(2))
    one.create("WAITING", {"slot": "a", "attempt": 0})
    with one.backend._backend.engine.begin() as connection:
        connection.exec_driver_sql("SELECT state FROM trials").all()
        if locks:
            with pytest.raises(AccessError, match="database is locked"):
                other.trials()
        else:
            assert other.claim(other.trials()[0]._trial_id), "between another's reading and writing"
    assert len(other.trials()) == 1
