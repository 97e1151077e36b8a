import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from surgery.checkpoint.dtypes import BITS, FLOAT, code_of, torch_dtype
from surgery.checkpoint.header import build_header, parse_header, read_header
from surgery.errors import AccessError, InputError

GOOD = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [30, 38]},
}
DATA = 38


def packed(header: object, data: int = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def parsed(content: bytes):
    return parse_header("aligned/model.safetensors", content, len(content), file="model.safetensors")


def changed(**entries: object) -> dict:
    return {**GOOD, **entries}


def weight(**fields: object) -> dict:
    return changed(w={**GOOD["w"], **fields})


def test_a_good_header_is_read():
    header = parsed(packed(GOOD))
    assert [tensor.name for tensor in header.tensors] == ["w", "b"]
    assert header.metadata == {"format": "pt"}
    tensor = header.tensors[1]
    assert (tensor.dtype, tensor.shape, tensor.nbytes, tensor.numel) == ("F32", (2,), 8, 2)
    assert tensor.start == header.length + 30
    assert tensor.file == "model.safetensors"


def test_tensors_come_in_the_order_of_their_bytes():
    shuffled = {name: GOOD[name] for name in ("b", "w")}
    assert [tensor.name for tensor in parsed(packed(shuffled)).tensors] == ["w", "b"]


BAD = {
    "empty file": (b"", "truncated"),
    "less than a length": (b"\x08\x00\x00", "truncated"),
    "header of absurd size": (struct.pack("<Q", 2**63) + b"{}", "claims a header"),
    "header longer than the file": (struct.pack("<Q", 99_000) + b"{}", "truncated"),
    "data cut short": (packed(GOOD)[:-1], "truncated"),
    "bytes after the last tensor": (packed(GOOD) + b"\0", "after its last tensor"),
    "not JSON": (packed(b'{"w": }'), "not JSON"),
    "not an object": (packed(b"[1, 2]"), "no JSON header"),
    "blank before the object": (packed(b" {}", 0), "no JSON header"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "UTF-8"),
    "half a surrogate pair": (packed(b'{"__metadata__": {"a": "\\ud800"}}', 0), "UTF-8"),
    "nested deeply": (packed(b'{"w":' + b"[" * 200_000), "nested"),
    "number of many digits": (packed(b'{"w": ' + b"9" * 9000 + b"}"), "not usable JSON"),
    "NaN": (packed(b'{"w": NaN}'), "not usable JSON"),
    "same tensor twice": (
        packed(b"{" + b'"b":{"dtype":"U8","shape":[],"data_offsets":[0,1]},' * 2 + b'"c":1}', 1),
        "key b stands there twice",
    ),
    "same key twice": (
        packed(b'{"b":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
        "key dtype stands there twice",
    ),
    "metadata not text": (packed(changed(__metadata__={"n": 1})), "__metadata__"),
    "metadata no object": (packed(changed(__metadata__=["pt"])), "__metadata__"),
    "entry no object": (packed(changed(w=[1])), "tensor w"),
    "entry with less": (packed(changed(w={"dtype": "BF16", "shape": [3, 5]})), "tensor w"),
    "entry with more": (packed(weight(strides=[1, 2])), "tensor w"),
    "unknown dtype": (packed(weight(dtype="Q4_K")), "unknown dtype Q4_K"),
    "dtype no text": (packed(weight(dtype=["F32"])), "unknown dtype"),
    "negative size": (packed(weight(shape=[-3, -5])), "impossible shape"),
    "truth value as size": (packed(weight(shape=[True, 15])), "impossible shape"),
    "fraction as size": (packed(weight(shape=[3.0, 5])), "impossible shape"),
    "shape no list": (packed(weight(shape=15)), "impossible shape"),
    "absurd shape": (packed(weight(shape=[2**62, 2**62])), "impossible shape"),
    "absurd and empty": (packed(weight(shape=[2**62, 2**62, 0])), "impossible shape"),
    "size beyond 64 bits": (packed(weight(shape=[2**64, 0])), "impossible shape"),
    "too many dimensions": (packed(weight(shape=[15] + [1] * 64)), "impossible shape"),
    "offsets backwards": (packed(weight(data_offsets=[30, 0])), "impossible data_offsets"),
    "three offsets": (packed(weight(data_offsets=[0, 30, 30])), "impossible data_offsets"),
    "negative offset": (packed(weight(data_offsets=[-30, 0])), "impossible data_offsets"),
    "bytes against shape": (packed(weight(shape=[4, 5])), "needs 40"),
    "half a byte": (
        packed({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
        "needs 1.5",
    ),
    "overlap": (packed(changed(b={**GOOD["b"], "data_offsets": [26, 34]}), 34), "overlaps"),
    "gap": (packed(changed(b={**GOOD["b"], "data_offsets": [34, 42]}), 42), "leaves a gap"),
    "gap at the start": (packed(changed(w={**GOOD["w"], "data_offsets": [8, 38]})), "gap|overlaps"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_one_line_naming_the_file(case):
    content, pattern = BAD[case]
    with pytest.raises(InputError, match=pattern) as caught:
        parsed(content)
    message = str(caught.value)
    assert "aligned/model.safetensors" in message
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_as_a_bad_header_is(case, tmp_path):
    content, pattern = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=pattern):
        read_header(path, "aligned/model.safetensors")


def test_a_name_with_a_line_break_stays_on_one_line():
    header = {"evil\n\x1b[31m": {**GOOD["w"], "dtype": "X"}}
    with pytest.raises(InputError) as caught:
        parsed(packed(header, 30))
    assert str(caught.value).isprintable()


def test_an_absurd_length_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(10**12)  # sparse: takes no disk, and would take all memory
    with pytest.raises(InputError, match="claims a header"):
        read_header(path, "model.safetensors")


def test_a_missing_file_a_folder_and_a_pipe_are_input_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = {
        "missing": "missing",
        ".": "not a regular file",
        "pipe": "not a regular file",
        "link": "link to nothing",
        "loop": "cannot be read",
    }
    for name, pattern in found.items():
        with pytest.raises(InputError, match=pattern):
            read_header(tmp_path / name, name)


def test_no_right_to_read_is_an_access_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    read_header(tmp_path / "w.safetensors", "w")
    monkeypatch.setattr("surgery.checkpoint.reading.os.open", refuse)
    with pytest.raises(AccessError, match="no right to read"):
        read_header(tmp_path / "w.safetensors", "w")


def test_every_dtype_has_a_size_and_goes_to_torch_and_back():
    for code, bits in BITS.items():
        if code in {"F4", "F6_E2M3", "F6_E3M2"}:
            with pytest.raises(InputError, match=code):
                torch_dtype(code)
            continue
        dtype = torch_dtype(code)
        assert 8 * dtype.itemsize == bits
        assert code_of(dtype) == code
    assert {code for code in FLOAT if torch_dtype(code).is_floating_point} == FLOAT
    with pytest.raises(InputError, match="qint8"):
        code_of(torch.qint8)


def test_the_sizes_are_those_that_the_safetensors_library_writes():
    codes = [code for code in BITS if code not in {"F4", "F6_E2M3", "F6_E3M2"}]
    content = save({code: torch.zeros(3, dtype=torch_dtype(code)) for code in codes})
    header = parse_header("x", content, len(content))
    assert {tensor.name: tensor.dtype for tensor in header.tensors} == {code: code for code in codes}


def rebuilt(path: Path) -> tuple[bytes, bytes]:
    header = read_header(path, path.name)
    rows = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in header.tensors]
    return build_header(rows, header.metadata), header.raw


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"a": 'é"\\\n\x01\x7f'}])
def test_a_rebuilt_header_is_the_library_s_byte_for_byte(tmp_path, metadata):
    tensors = {
        "model.layers.10.w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "model.layers.2.w": torch.zeros(7, 1, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        'odd "\\/\t\x01\x7fé\u2028': torch.zeros(1, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    ours, theirs = rebuilt(tmp_path / "x.safetensors")
    assert ours == theirs
    assert len(ours) % 8 == 0


def test_another_order_of_tensors_gives_another_header():
    rows = [("a", "F32", (2,), 8), ("b", "F32", (2,), 8)]
    assert build_header(rows, {}) != build_header(rows[::-1], {})
