"""Whatever bytes a weight file or an index holds: an error of ours, or what the safetensors library reads too."""

import json
import tempfile
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from surgery.checkpoint.dtypes import BITS, torch_dtype
from surgery.checkpoint.header import build_header, parse_header, read_header
from surgery.checkpoint.layout import INDEX, open_checkpoint
from surgery.checkpoint.reader import Reader
from surgery.errors import SurgeryError

BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ONE = save(
    {"w": torch.arange(15).reshape(3, 5).to(torch.bfloat16), "b": torch.ones(2), "e": torch.zeros(0, 3)},
    metadata={"format": "pt"},
)
TWO = save({"v": torch.arange(6, dtype=torch.int64), "t": torch.tensor(True)})
HEAD = 8 + int.from_bytes(ONE[:8], "little")

SIZES = st.integers(-2, 40) | st.sampled_from(
    [2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, True, None, "3"]
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "bf16", "", None]),
        "shape": st.lists(SIZES, max_size=4) | SIZES,
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
    },
    optional={"more": st.integers()},
)
HEADERS = st.dictionaries(
    st.sampled_from(["w", "b", "", "a.b", "\u00e9", "\n", "__metadata__"]),
    ENTRIES | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=2),
    max_size=4,
)


@contextmanager
def folder(**files: bytes):
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file.replace("__", ".")).write_bytes(content)
        yield Path(name)


def attempted(path):
    """The checkpoint, or None when it was refused in one printable line."""
    try:
        return open_checkpoint(path, "aligned")
    except SurgeryError as error:
        refusal = str(error)
    assert refusal.isprintable()
    return None


def agrees(content: bytes) -> bool:
    """Whether it is accepted; if so it must be what the library reads."""
    with folder(model__safetensors=content) as path:
        checkpoint = attempted(path)
        if checkpoint is None:
            return False
        with safe_open(path / "model.safetensors", "pt") as theirs, Reader(checkpoint) as ours:
            assert set(checkpoint.tensors) == set(theirs.keys())
            assert checkpoint.shards[0].header.metadata == (theirs.metadata() or {})
            for name, tensor in checkpoint.tensors.items():
                view = theirs.get_slice(name)
                assert (tensor.dtype, tensor.shape) == (view.get_dtype(), tuple(view.get_shape()))
                if tensor.dtype[:2] not in {"F4", "F6"}:
                    expected = theirs.get_tensor(name).reshape(-1).view(torch.uint8)
                    assert torch.equal(ours.read(name).reshape(-1).view(torch.uint8), expected)
                    assert b"".join(ours.raw(name, 7)) == bytes(expected.tolist())
    return True


def test_a_valid_file_is_accepted():
    assert agrees(ONE)
    assert agrees(TWO)


@BOUNDED
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
def test_arbitrary_bytes_are_refused_or_read_as_the_library_does(content):
    agrees(content)


@BOUNDED
@given(st.data())
def test_a_mutated_file_is_refused_or_read_as_the_library_does(data):
    content = bytearray(ONE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(HEAD, len(content)) - 1) | st.integers(0, 8))
        match data.draw(st.sampled_from(["set", "cut", "add", "digit"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "add":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "digit":
                content[at] = ord(data.draw(st.sampled_from('0123456789-,:{}[]"e. ')))
        if len(content) < 9:
            break
    agrees(bytes(content))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
CODES = st.sampled_from([code for code in BITS if code not in {"F4", "F6_E2M3", "F6_E3M2"}])
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def nearly_valid(draw):
    """A header that fits its file, and as often one that misses by a little; and the bytes of data."""
    tensors = draw(st.dictionaries(NAMES, st.tuples(CODES, SHAPES), max_size=4))
    header, end = {}, 0
    for name, (code, shape) in tensors.items():
        start, end = end, end + prod(shape) * BITS[code] // 8
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = dict(draw(st.permutations(list(header.items()))))
    if header and draw(st.booleans()):
        entry = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[field] = (
            draw(CODES) if field == "dtype" else [size + draw(st.integers(-2, 2)) for size in entry[field]]
        )
    return header, end


@BOUNDED
@given(nearly_valid(), st.sampled_from([0, 0, 0, 1, -1]))
def test_a_nearly_valid_header_is_refused_or_read_as_the_library_does(made, missing):
    header, size = made
    text = json.dumps(header, ensure_ascii=len(header) % 2 == 0).encode()
    agrees(len(text).to_bytes(8, "little") + text + bytes(max(0, size - missing)))


@BOUNDED
@given(HEADERS, st.integers(0, 64), st.sampled_from([b"", b" ", b"\n\t ", b"\0", b"x"]))
def test_an_invented_header_is_refused_or_read_as_the_library_does(header, size, padding):
    text = json.dumps(header).encode() + padding
    agrees(len(text).to_bytes(8, "little") + text + bytes(size))


def test_inventions_that_fit_are_accepted():
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b"\n\t "
    assert agrees(len(text).to_bytes(8, "little") + text + bytes(8))


GOOD_INDEX = {
    "metadata": {"total_size": 87},
    "weight_map": {name: "one.safetensors" for name in "wbe"} | {name: "two.safetensors" for name in "vt"},
}
FILES = st.sampled_from(
    [
        "one.safetensors",
        "two.safetensors",
        "three.safetensors",
        "../one.safetensors",
        "/etc/passwd",
        ".",
        "",
        "a/b",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | FILES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def opened(index: bytes) -> bool:
    with folder(one__safetensors=ONE, two__safetensors=TWO) as path:
        (path / INDEX).write_bytes(index)
        checkpoint = attempted(path)
        if checkpoint is None:
            return False
    weight_map = json.loads(index)["weight_map"]
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == weight_map
    assert {shard.name for shard in checkpoint.shards} == set(weight_map.values())
    return True


def test_a_valid_index_is_accepted():
    assert opened(json.dumps(GOOD_INDEX).encode())


@BOUNDED
@given(
    st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from([*"wbevt", "x", ""]), FILES | ANYTHING) | ANYTHING},
        optional={"metadata": ANYTHING},
    )
    | ANYTHING
)
def test_an_invented_index_is_refused_or_means_what_it_says(index):
    opened(json.dumps(index).encode())


@BOUNDED
@given(st.data())
def test_a_mutated_index_is_refused_or_means_what_it_says(data):
    content = bytearray(json.dumps(GOOD_INDEX).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    opened(bytes(content))


@BOUNDED
@given(
    st.dictionaries(NAMES, st.tuples(CODES, SHAPES), min_size=1, max_size=6),
    st.none()
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), NAMES, max_size=3),
)
def test_a_rebuilt_header_is_the_library_s_byte_for_byte(tensors, metadata):
    content = save(
        {name: torch.zeros(shape, dtype=torch_dtype(code)) for name, (code, shape) in tensors.items()},
        metadata,
    )
    header = parse_header("x", content, len(content))
    rows = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in header.tensors]
    if metadata != {}:
        assert build_header(rows, header.metadata) == header.raw
    assert header.raw == content[: header.length]


def test_a_header_read_from_disk_is_the_one_parsed_from_memory(tmp_path):
    (tmp_path / "x").write_bytes(ONE)
    assert read_header(tmp_path / "x", "x", file="y") == parse_header("x", ONE, len(ONE), file="y")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_check_of_agreement_can_fail(chunk):
    damaged = bytearray(ONE)
    damaged[-1] ^= 1
    with folder(model__safetensors=bytes(damaged)) as path, Reader(open_checkpoint(path, "x")) as reader:
        stored = b"".join(b"".join(reader.raw(name, chunk)) for name in reader._checkpoint.tensors)
    assert stored == bytes(damaged[HEAD:])
    assert stored != ONE[HEAD:]
