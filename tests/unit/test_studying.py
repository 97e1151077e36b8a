"""Studies: trials that are planned once, claimed by one process, and kept; seen from inside one process."""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import studies
from studies import IDENTITY, LONG, SHORT, claimed, die, leased, numbers, planned

from surgery.errors import InputError
from surgery.studying import Study, owner, pieces, slots
from surgery.studying.slots import ATTEMPTS

place = studies.place
opened = studies.opened
dead = studies.dead


def test_trials_are_claimed_in_the_order_planned_and_none_twice(opened):
    one, other = opened(), opened()
    one.add(planned(6))
    other.add(planned(6))
    trials = [study.claim() for study in (one, other, other, one, other, one)]
    assert [trial.params for trial in trials] == planned(6)
    assert [trial.number for trial in trials] == list(range(6))
    assert one.claim() is None
    assert other.claim() is None


def test_results_come_in_the_order_planned_not_in_that_of_completion(opened):
    study = opened()
    study.add(planned(4))
    for trial in reversed(claimed(study)):
        if trial.number == 2:
            trial.fail("diverged")
        else:
            trial.finish({"harm": trial.number / 4}, [trial.number / 4])
    found = opened().finished()
    assert [(one.number, one.params["seed"]) for one in found] == [(number, number) for number in range(4)]
    assert [one.result for one in found] == [{"harm": 0.0}, {"harm": 0.25}, None, {"harm": 0.75}]
    assert [one.error for one in found] == [None, None, "diverged", None]
    assert study.unfinished() == ()


def test_a_trial_planned_running_or_done_is_not_planned_again(opened):
    study = opened()
    study.add(planned(3))
    study.claim().finish({})
    study.claim()
    study.add(planned(4))
    opened().add(reversed(planned(4)))
    assert study.unfinished() == tuple(planned(4)[1:])
    assert [trial.params for trial in claimed(study)] == planned(4)[2:]


def test_parameters_keep_their_kind(opened):
    study = opened()
    wanted = [{"x": 1}, {"x": 1.0}, {"x": True}, {"x": "1"}, {"x": 1e-5}]
    study.add(wanted)
    study.add([dict(reversed(list(params.items()))) for params in [{"a": 1, "b": 2}, {"b": 2, "a": 1}]])
    found = [trial.params for trial in claimed(opened())]
    assert found == [*wanted, {"a": 1, "b": 2}]
    assert [type(params["x"]) for params in found[:5]] == [int, float, bool, str, float]


def test_what_two_processes_plan_at_once_is_run_once(opened):
    one, other = opened(), opened()
    # Both have looked and found nothing; now both write.
    for study in (one, other):
        study._storage.create("WAITING", {"slot": "a", "attempt": 0, "params": {"x": 1}})
    assert len(claimed(one)) == 1
    assert claimed(other) == []
    other.add([{"y": 2}])
    states = Counter(trial.state.name for trial in one._storage.trials() if "slot" in trial.user_attrs)
    assert states == {"RUNNING": 1, "FAIL": 1, "WAITING": 1}, "what does not count waits no more"
    assert one.finished() == ()


def test_a_long_result_comes_back_as_it_was(opened):
    study = opened()
    result = {"curve": [[step, step / 7, 'ü"\\\n'] for step in range(12_000)], "none": None}
    assert len(json.dumps(result)) > 300_000
    study.add(planned(1))
    study.claim().finish(result, [1.0])
    [found] = opened().finished()
    assert found.result == result
    lengths = [len(json.dumps(one)) for trial in study._storage.trials() for one in trial.user_attrs.values()]
    assert max(lengths) < 65_535, "what MySQL's column holds"


@pytest.mark.parametrize("length", [0, 1, 29_997, 29_998, 29_999, 60_000])
def test_pieces_are_put_together_again(length):
    document = "x" * length
    assert pieces.joined("result", {**pieces.split("result", document), "other": 1}) == document
    assert pieces.joined("error", pieces.split("result", document)) is None


def test_a_result_that_json_has_not_is_refused_and_the_trial_goes_on(opened):
    study = opened()
    study.add(planned(1))
    trial = study.claim()
    with pytest.raises(TypeError):
        trial.finish({"x": object()})
    assert study.finished() == ()
    trial.finish({"x": math.inf})
    assert study.finished()[0].result == {"x": math.inf}


def test_a_study_of_another_identity_is_refused_with_the_first_key_that_differs(opened):
    opened().add(planned(1))
    opened(IDENTITY | {})
    with pytest.raises(InputError, match=r"its options\.steps is 10, here it is 20; .*remove that one"):
        opened({"model": "abc", "options": {"steps": 20, "rates": [1]}})
    with pytest.raises(InputError, match="its data is not given, here it is 3"):
        opened({**IDENTITY, "data": 3})
    with pytest.raises(InputError, match=r'its model is "abc", here it is not given'):
        opened({"options": IDENTITY["options"]})
    assert opened().unfinished() == tuple(planned(1))


def test_of_two_identities_written_at_once_the_first_counts(opened):
    one = opened()
    one._storage.create("FAIL", {"kept": "identity", **pieces.split("document", {"model": "other"})})
    opened()
    with pytest.raises(InputError, match="its model is"):
        opened({"model": "other"})


def test_studies_of_other_names_live_side_by_side(place):
    one = Study.open(place, "a", identity={"of": "a"})
    other = Study.open(place, "b", identity={"of": "b"})
    one.add(planned(2))
    assert other.claim() is None
    assert one.claim() is not None


def test_what_is_not_there_is_not_made_where_it_may_not(opened, place):
    with pytest.raises(InputError, match=r"run the command that makes"):
        opened(create=False)
    opened()
    assert opened(create=False).claim() is None
    with pytest.raises(InputError, match="has no study 'other'"):
        Study.open(place, "other", identity=IDENTITY, create=False)


def test_a_trial_whose_process_died_is_run_anew_at_once(opened, dead):
    study = opened()
    study.add(planned(2))
    trial = study.claim()
    die(study, trial, dead)
    [last, again] = claimed(opened())
    assert (last.number, again.number) == (1, 0), "those never tried come first"
    assert again.params == planned(1)[0]
    trial.finish({"of": "the dead"})
    assert study.finished() == (), "what the dead process had to say is not kept"
    again.finish({"of": "the living"})
    assert [one.result for one in study.finished()] == [{"of": "the living"}]


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_lapses(opened, monkeypatch):
    study = opened(lease=SHORT)
    study.add(planned(2))
    living, silent = study.claim(), study.claim()
    silent._over.set()
    silent._renewing.join()
    said = leased(study, silent)
    for _ in range(600):
        if leased(study, living) > said + SHORT:
            break
        time.sleep(0.1)
    assert leased(study, living) > said + SHORT
    assert leased(study, silent) == said
    # Whoever looks has a clock that stands between the two ends, however long a busy machine takes to look.
    monkeypatch.setattr(slots, "time", SimpleNamespace(time=lambda: said + LONG + SHORT / 2))
    assert [trial.number for trial in claimed(opened(lease=LONG))] == [1]
    silent.finish({})
    living.finish({})
    assert numbers(study) == [0]


def test_a_trial_that_nobody_holds_any_more_lapses(opened):
    study = opened(lease=SHORT)
    study.add(planned(1))
    study.claim()
    time.sleep(3 * SHORT)
    assert study.claim() is not None, "the object is gone, so its lease was not renewed"


def test_a_process_that_died_between_claim_and_lease_is_noticed(opened, monkeypatch):
    study = opened(lease=LONG)
    study.add(planned(1))
    [trial] = [trial for trial in study._storage.trials() if "slot" in trial.user_attrs]
    assert study._storage.claim(trial._trial_id)
    assert study.claim() is None
    later = time.time() + LONG
    monkeypatch.setattr(slots, "time", SimpleNamespace(time=lambda: later))
    assert study.claim() is not None


def test_a_trial_given_up_by_a_process_that_died_then_is_planned_again(opened):
    study = opened()
    study.add(planned(1))
    assert study._storage.end(study.claim()._key, "FAIL", {"abandoned": True})
    assert study.finished() == ()
    assert len(study.unfinished()) == 1
    assert opened().claim().number == 0


def test_a_trial_that_kills_its_processes_ends_failed(opened, dead):
    study = opened()
    study.add(planned(2))
    for _ in range(ATTEMPTS):
        trial = next(trial for trial in claimed(study) if trial.number == 0)
        die(study, trial, dead)
    assert [trial.number for trial in claimed(opened())] == []
    [found] = opened().finished()
    assert (found.number, found.result) == (0, None)
    assert found.error == f"abandoned: {ATTEMPTS} processes ended while they ran it"
    assert study.unfinished() == (planned(2)[1],)


def test_a_trial_given_back_was_not_tried(opened):
    study = opened()
    study.add(planned(1))
    for _ in range(2 * ATTEMPTS):
        study.claim().give_back()
    trial = opened().claim()
    trial.finish({"x": 1})
    trial.give_back()
    trial.fail("too late")
    assert [(one.result, one.error) for one in study.finished()] == [({"x": 1}, None)]


def test_a_process_may_wait_for_what_others_run(opened, dead):
    study, other = opened(), opened()
    study.add(planned(2))
    mine, theirs = study.claim(), other.claim()
    begun = time.monotonic()
    assert study.claim() is None
    assert study.claim(patience=0.3) is None
    assert 0.3 <= time.monotonic() - begun < 20
    mine.finish({})
    die(other, theirs, dead)
    again = study.claim(patience=60.0)
    assert again.number == 1
    again.finish({})
    assert study.claim(patience=600.0) is None, "all have ended: nothing to wait for"


def test_any_order_of_claims_ends_and_deaths_runs_every_trial_to_one_end(place, dead):
    draw = random.Random(7)
    handles = [Study.open(place, "model", identity={}, lease=LONG) for _ in range(3)]
    running, ended, deaths = [], Counter(), Counter()
    for _ in range(150):
        study = draw.choice(handles)
        what = draw.choice(["add", "claim", "claim", "finish", "finish", "fail", "die", "give back"])
        if what == "add":
            study.add(planned(draw.randint(1, 12)))
        elif what == "claim":
            if (trial := study.claim()) is not None:
                assert trial.number not in {other.number for other, _ in running}
                assert not ended[trial.number]
                assert deaths[trial.number] < ATTEMPTS
                running.append((trial, study))
        elif running:
            trial, study = running.pop(draw.randrange(len(running)))
            if what == "die":
                die(study, trial, dead)
                deaths[trial.number] += 1
            else:
                {
                    "finish": lambda t=trial: t.finish({"n": t.number}),
                    "fail": lambda t=trial: t.fail("x"),
                }.get(what, trial.give_back)()
                ended[trial.number] += what != "give back"
    handles[0].add(planned(12))
    for trial in [*(trial for trial, _ in running), *claimed(handles[0])]:
        trial.finish({"n": trial.number})
        ended[trial.number] += 1
    found = handles[1].finished()
    assert len({one.params["seed"] for one in found}) == len(found) == 12
    assert deaths.total() > 5
    for one in found:
        assert ended[one.number] == (deaths[one.number] < ATTEMPTS)
        assert one.result is None or one.result == {"n": one.number}


def test_a_process_is_told_from_another_of_its_number_and_from_one_elsewhere(dead):
    me = owner.me()
    assert not owner.is_gone(me)
    assert owner.is_gone(dead)
    assert owner.is_gone({**me, "started": "1"}), "the number came again"
    assert not owner.is_gone({**dead, "place": "elsewhere"})


def test_a_process_that_has_ended_but_was_not_waited_for_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = {**owner.me(), "pid": child.pid, "started": owner._started(child.pid)}
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_gone(known)
    child.wait(60)
