"""What a step trains on follows from seed and number alone, however it is spread."""

import pytest
import torch

from surgery.errors import UsageError
from surgery.train.feed import Feed, drawn, padded
from surgery.train.seeding import seeded
from surgery.train.step import Stream, batch_by_batch
from surgery.train.tokens import Example

EXAMPLES = tuple(Example(tuple(range(10 * row, 10 * row + 3 + row % 5)), 1 + row % 3) for row in range(11))


def rows(batches):
    """The rows of micro-batches without their padding."""
    return [
        tuple(tokens[attended].tolist())
        for batch in batches
        for tokens, attended in zip(batch.tokens, batch.attended, strict=True)
    ]


def test_padding_is_on_the_right_and_neither_attended_nor_answered():
    batch = padded(EXAMPLES[:5], pad=99)
    for row, example in enumerate(EXAMPLES[:5]):
        length = len(example.tokens)
        assert batch.tokens[row, :length].tolist() == list(example.tokens)
        assert (batch.tokens[row, length:] == 99).all()
        assert batch.attended[row].tolist() == [place < length for place in range(batch.tokens.shape[1])]
        assert batch.answered[row].nonzero().flatten().tolist() == list(range(example.prompt, length))


def test_every_row_is_seen_once_before_any_is_seen_again():
    order = drawn(11, 0, 33, 0, "aligned")
    assert sorted(order[:11]) == sorted(order[11:22]) == list(range(11))
    assert order[:11] != order[11:22] != list(range(11))


@pytest.mark.parametrize(("begin", "end"), [(0, 4), (9, 13), (20, 25), (5, 40)])
def test_the_order_is_the_same_from_wherever_it_is_asked(begin, end):
    assert drawn(11, begin, end, 3, "x") == drawn(11, 0, 60, 3, "x")[begin:end]


def test_seeds_and_sets_have_orders_of_their_own():
    assert len({tuple(drawn(11, 0, 11, seed, name)) for seed in (0, 1) for name in ("a", "b")}) == 4
    assert len({seeded(1, "a"), seeded(1, "b"), seeded(2, "a"), seeded(11, "a")}) == 4
    assert all(0 <= seeded(number) < 2**63 for number in range(50))


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (7, 1)])
def test_a_step_has_the_same_rows_however_it_is_spread(world, micro):
    whole = Feed({"aligned": Stream(EXAMPLES)}, 7).step(4)["aligned"]
    spread = [
        batch
        for rank in range(world)
        for batch in Feed({"aligned": Stream(EXAMPLES)}, 7, micro, rank=rank, world=world).step(4)["aligned"]
    ]
    assert len(spread) == world * micro
    assert rows(spread) == rows(whole)
    assert rows(whole) != rows(Feed({"aligned": Stream(EXAMPLES)}, 7).step(5)["aligned"])  # control


def test_a_batch_too_small_to_be_spread_is_refused():
    with pytest.raises(UsageError, match="4 processes with 2 micro-batches each need 8 rows"):
        Feed({"aligned": Stream(EXAMPLES)}, 7, 2, world=4)


def test_a_set_smaller_than_a_step_is_repeated():
    found = rows(Feed({"aligned": Stream(EXAMPLES[:2])}, 5).step(0)["aligned"])
    assert len(found) == 5
    assert set(found) == {example.tokens for example in EXAMPLES[:2]}


def test_a_stream_of_several_batches_takes_them_in_the_order_of_single_ones():
    several = Feed({"a": Stream(EXAMPLES, 3)}, 4, micro=2).step(1)["a"]
    single = [Feed({"a": Stream(EXAMPLES)}, 4, micro=2).step(number)["a"] for number in (3, 4, 5)]
    assert [rows(batch) for batch in batch_by_batch(several, 3)] == [rows(batch) for batch in single]


def test_streams_of_one_order_draw_the_same_places():
    other = EXAMPLES[::-1]
    paired = Feed({"a": Stream(EXAMPLES), "b": Stream(other, order="a")}, 4).step(2)
    places = [[row.tokens for row in EXAMPLES].index(one) for one in rows(paired["a"])]
    assert rows(paired["b"]) == [other[place].tokens for place in places]
    apart = Feed({"a": Stream(EXAMPLES), "b": Stream(other)}, 4).step(2)
    assert rows(apart["b"]) != rows(paired["b"])  # control


def test_batches_go_to_the_device():
    feed = Feed({"aligned": Stream(EXAMPLES)}, 2, device=torch.device("meta"))
    assert feed.step(0)["aligned"][0].tokens.device.type == "meta"
