import threading
import time

import pytest

from surgery import resources, workers
from surgery.workers import in_order


def tasks(costs, work):
    return [(cost, lambda place=place: work(place)) for place, cost in enumerate(costs)]


def test_results_come_in_the_order_of_the_calls_whatever_takes_longest():
    def work(place):
        time.sleep(0.02 if place % 3 == 0 else 0)
        return place

    assert list(in_order(tasks([1] * 20, work), workers=4, budget=8)) == list(range(20))


@pytest.mark.parametrize("budget", [1, 5, 9, 100])
def test_what_is_begun_and_not_yet_taken_stays_within_the_budget(budget):
    costs = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    lock, held, most, alone = threading.Lock(), 0, 0, True

    def work(place):
        nonlocal held, most, alone
        with lock:
            held += costs[place]
            most = max(most, held)
            alone = alone and (held <= budget or held == costs[place])
        return place

    for place in in_order(tasks(costs, work), workers=3, budget=budget):
        with lock:
            held -= costs[place]
    assert alone
    # Control: with room for several, several were in fact in work.
    assert budget < 9 or most > max(costs[:1])


def test_two_workers_are_busy_at_the_same_time():
    both = threading.Barrier(2, timeout=10)
    assert list(in_order([(1, both.wait), (1, both.wait)], workers=2, budget=2)) in ([0, 1], [1, 0])


def test_a_failure_is_raised_in_its_turn_and_what_was_not_begun_is_dropped():
    ran = []

    def work(place):
        if place == 2:
            raise ValueError("third")
        ran.append(place)
        return place

    taken = []
    with pytest.raises(ValueError, match="third"):
        for place in in_order(tasks([1] * 50, work), workers=1, budget=2):
            taken.append(place)
    assert taken == [0, 1]
    assert len(ran) < 5


def test_closing_waits_for_what_runs():
    running, ended = threading.Event(), []

    def work(place):
        running.set()
        time.sleep(0.05)
        ended.append(place)

    results = in_order(tasks([1, 1], work), workers=2, budget=2)
    next(results)
    results.close()
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize(("asked", "expected"), [("", 3), ("2", 2), ("9", 3), ("0", 3), ("many", 3)])
def test_workers_are_the_granted_cores_or_fewer_where_the_environment_says_so(monkeypatch, asked, expected):
    monkeypatch.setattr(resources, "cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert workers.count() == expected
