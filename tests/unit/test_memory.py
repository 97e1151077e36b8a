import pytest

from surgery import memory
from surgery.checkpoint.layout import open_checkpoint
from surgery.errors import ResourceError, UsageError
from surgery.methods.lox import LoX
from surgery.plan import plan_steps
from surgery.testing import tiny_pair


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 << 30), ("1500MB", 1_500_000_000), ("1.5 gib", 3 << 29), ("2e9", 2_000_000_000), ("7", 7)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "1TiBB", "1.2.3G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="no number of bytes"):
        memory.parse_bytes(text)


@pytest.fixture
def planned(tmp_path):
    tiny_pair(tmp_path)
    aligned, base = (open_checkpoint(tmp_path / name, name) for name in ("aligned", "base"))
    steps, _ = plan_steps(LoX(rank=2), aligned, base, dtype="keep")
    return steps, aligned, base


def test_a_limit_below_what_one_tensor_takes_is_refused_by_name(planned):
    largest, name = memory.largest_need(*planned)
    with pytest.raises(ResourceError, match=name):
        memory.in_work(*planned, str(memory.INTERPRETER + largest - 1))
    assert memory.in_work(*planned, str(memory.INTERPRETER + largest)) == largest


def test_the_estimate_never_exceeds_the_limit(planned):
    largest, _ = memory.largest_need(*planned)
    limit = memory.INTERPRETER + 2 * largest
    assert memory.estimate(*planned, str(limit)) <= limit
    assert memory.estimate(*planned, None) >= memory.INTERPRETER + largest
