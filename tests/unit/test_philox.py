"""Counter-based random bits: the published answers, and independence of how they are asked for."""

import torch

from surgery.kernels import philox

# Random123 1.14, `kat_vectors`: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return [int(word, 16) for word in text.split()]


def _answer(counter, key):
    found = philox.philox4x32(torch.tensor(counter, dtype=torch.int64)[:, None], tuple(key))
    return found[:, 0].tolist()


def test_philox_gives_the_published_answers():
    for counter, key, answer in KNOWN:
        assert _answer(_words(counter), _words(key)) == _words(answer)


def test_one_bit_of_counter_or_key_changes_about_half_of_the_bits():
    counter, key, answer = map(_words, KNOWN[2])
    for other in (_answer([counter[0] ^ 1, *counter[1:]], key), _answer(counter, [key[0], key[1] ^ 1])):
        flipped = sum((a ^ b).bit_count() for a, b in zip(other, answer, strict=True))
        assert 36 <= flipped <= 92  # 64 of 128 expected, 5 standard deviations either way


def test_many_counters_at_once_are_the_same_as_one_by_one():
    counters = torch.tensor([_words(counter) for counter, _, _ in KNOWN], dtype=torch.int64)
    key = (0x12345678, 0x9ABCDEF0)
    together = philox.philox4x32(counters.T, key)
    assert together.T.tolist() == [_answer(row, key) for row in counters.tolist()]


def test_uniform_numbers_depend_on_their_index_alone():
    words = philox.key(3, "layer.weight")
    whole = philox.uniform(0, 1001, words)
    for start, count in ((0, 1), (1, 2), (3, 5), (7, 994), (1000, 1)):
        torch.testing.assert_close(
            philox.uniform(start, count, words), whole[start : start + count], rtol=0, atol=0
        )
    assert not torch.equal(
        philox.uniform(1, 1000, words), whole[:1000]
    )  # control: another start is another stream


def test_an_index_beyond_32_bits_uses_the_second_counter_word():
    words = philox.key(0, "w")
    index = 4 * 2**32 + 5
    counter = torch.tensor([[1], [1], [0], [0]], dtype=torch.int64)
    expected = philox.philox4x32(counter, words)[1, 0].item() / 2**32
    assert philox.uniform(index, 1, words).item() == expected
    assert philox.uniform(5, 1, words).item() != expected


def test_keys_differ_by_seed_and_by_name():
    keys = {philox.key(seed, name) for seed in (-1, 0, 1, 10) for name in ("a", "b", "0\na")}
    assert len(keys) == 12
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = philox.uniform(0, 100_000, philox.key(1, "w"))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    expected = 100_000 / 20
    # Chi-squared with 19 degrees of freedom exceeds 60 with probability 4e-6.
    assert ((counts - expected) ** 2 / expected).sum() < 60
    bunched = torch.histc(numbers**1.1, bins=20, min=0, max=1)
    assert ((bunched - expected) ** 2 / expected).sum() > 60  # control: a slight unevenness is seen
