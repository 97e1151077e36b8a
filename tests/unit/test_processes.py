import pytest

from surgery import processes
from surgery.errors import UsageError
from surgery.processes import Team, shares


def test_shares_are_even_and_complete_and_the_same_whatever_the_order():
    costs = [(f"shard-{number}", float(cost)) for number, cost in enumerate([9, 1, 7, 7, 3, 5, 2, 2, 8, 4])]
    for size in (1, 2, 3, 7):
        found = shares(costs, size)
        assert sorted(name for names in found for name in names) == sorted(name for name, _ in costs)
        assert found == shares(reversed(costs), size)
        loads = [sum(dict(costs)[name] for name in names) for names in found]
        # Largest first leaves no process more than the largest piece above another.
        assert max(loads) - min(loads) <= 9
    # Control: dealing them out in turn is less even.
    dealt = [sum(cost for _, cost in costs[start::3]) for start in range(3)]
    even = [sum(dict(costs)[name] for name in names) for names in shares(costs, 3)]
    assert max(even) < max(dealt)


def test_more_processes_than_shards_leaves_some_without():
    assert shares([("one", 1.0)], 3) == [["one"], [], []]


def test_one_process_agrees_with_itself():
    alone = Team()
    assert alone.leads
    assert alone.gather(7) == [7]
    assert alone.agree(lambda: "done") == "done"
    with pytest.raises(OSError, match="disk"):
        alone.agree(lambda: (_ for _ in ()).throw(OSError("disk")))


@pytest.mark.parametrize("size", ["two", "2", ""])
def test_an_environment_that_no_launcher_made_is_refused_by_name(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    processes.team.cache_clear()
    with pytest.raises(UsageError, match=r"WORLD_SIZE is .*accelerate launch"):
        processes.team()
    processes.team.cache_clear()
