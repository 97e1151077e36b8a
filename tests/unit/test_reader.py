import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from surgery.checkpoint.layout import INDEX, open_checkpoint
from surgery.checkpoint.reader import Reader, file_checksum, file_sha256
from surgery.errors import AccessError, InputError

TENSORS = {
    "bf16": torch.linspace(-3, 3, 15).reshape(3, 5).to(torch.bfloat16),
    "fp16": torch.linspace(-3, 3, 7).to(torch.float16),
    "fp32": torch.linspace(-3, 3, 6).reshape(2, 1, 3),
    "fp64": torch.linspace(-3, 3, 5, dtype=torch.float64),
    "fp8": torch.linspace(-3, 3, 5).to(torch.float8_e4m3fn),
    "ids": torch.arange(9).reshape(1, 9),
    "mask": torch.tensor([[True, False, True]]),
    "complex": torch.tensor([1 + 2j, 3 - 4j]),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
}


def as_bytes(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def pickled(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    return tmp_path


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_for_bit(folder, name):
    with Reader(open_checkpoint(folder, "aligned")) as reader:
        tensor = reader.read(name)
    assert tensor.dtype == TENSORS[name].dtype
    assert tensor.shape == TENSORS[name].shape
    assert tensor.is_contiguous()
    assert as_bytes(tensor) == as_bytes(TENSORS[name])


@pytest.mark.parametrize("name", TENSORS)
def test_a_pickled_tensor_comes_back_bit_for_bit(pickled, name):
    with Reader(open_checkpoint(pickled, "aligned", allow_pickle=True)) as reader:
        tensor = reader.read(name)
        assert b"".join(reader.raw(name, 5)) == as_bytes(TENSORS[name])
    assert tensor.dtype == TENSORS[name].dtype
    assert as_bytes(tensor) == as_bytes(TENSORS[name])


@pytest.mark.parametrize("chunk", [1, 4, 7, 1 << 24])
@pytest.mark.parametrize("name", TENSORS)
def test_raw_pieces_are_the_stored_bytes(folder, name, chunk):
    with Reader(open_checkpoint(folder, "aligned")) as reader:
        pieces = [bytes(piece) for piece in reader.raw(name, chunk)]
    assert all(0 < len(piece) <= chunk for piece in pieces)
    assert b"".join(pieces) == as_bytes(TENSORS[name])


def test_a_tensor_that_was_read_is_one_s_own(folder):
    before = file_sha256(folder / "model.safetensors")
    with Reader(open_checkpoint(folder, "aligned")) as reader:
        first = reader.read("fp32")
        first.fill_(9)
        assert torch.equal(reader.read("fp32"), TENSORS["fp32"])
    assert first.eq(9).all()
    assert file_sha256(folder / "model.safetensors") == before


def test_a_pickled_tensor_that_was_read_is_one_s_own(pickled):
    before = file_sha256(pickled / "pytorch_model.bin")
    with Reader(open_checkpoint(pickled, "aligned", allow_pickle=True)) as reader:
        reader.read("fp32").fill_(9)
        assert torch.equal(reader.read("fp32"), TENSORS["fp32"])
    assert file_sha256(pickled / "pytorch_model.bin") == before


def test_reads_through_several_threads_agree(tmp_path):
    parts = [
        {f"{shard}.{row}": torch.full((33, 5), 10.0 * shard + row) for row in range(8)} for shard in range(5)
    ]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    before = len(os.listdir("/proc/self/fd"))
    with Reader(open_checkpoint(tmp_path, "aligned")) as reader, ThreadPoolExecutor(8) as pool:
        found = dict(zip(weight_map, pool.map(reader.read, weight_map), strict=True))
        assert len(os.listdir("/proc/self/fd")) == before + len(parts)
    assert len(os.listdir("/proc/self/fd")) == before
    for part in parts:
        assert all(torch.equal(found[name], tensor) for name, tensor in part.items())


def test_an_unknown_name_is_refused(folder):
    with Reader(open_checkpoint(folder, "aligned")) as reader:
        for read in (reader.read, lambda name: list(reader.raw(name))):
            with pytest.raises(InputError, match="no tensor ghost"):
                read("ghost")


def test_a_file_that_changed_size_is_refused(folder):
    checkpoint = open_checkpoint(folder, "aligned")
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with Reader(checkpoint) as reader, pytest.raises(InputError, match="changed"):
        reader.read("fp32")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(folder, name):
    with Reader(open_checkpoint(folder, "aligned")) as reader:
        reader.read(name)
        os.truncate(folder / "model.safetensors", 100)
        with pytest.raises(InputError, match="ended early"):
            reader.read(name)
        with pytest.raises(InputError, match="ended early"):
            list(reader.raw(name))


def test_a_pickle_that_was_replaced_is_refused(pickled):
    checkpoint = open_checkpoint(pickled, "aligned", allow_pickle=True)
    torch.save({"fp32": torch.zeros(3)}, pickled / "pytorch_model.bin")
    with Reader(checkpoint) as reader:
        for name in ("fp32", "bf16"):
            with pytest.raises(InputError, match="changed"):
                reader.read(name)


def test_a_dtype_that_torch_lacks_is_refused_and_its_bytes_can_be_copied(tmp_path):
    text = json.dumps({"w": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abcd")
    with Reader(open_checkpoint(tmp_path, "aligned")) as reader:
        with pytest.raises(InputError, match="F4"):
            reader.read("w")
        assert b"".join(reader.raw("w", 3)) == b"abcd"


def test_no_right_to_read_is_an_access_error(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    checkpoint = open_checkpoint(folder, "aligned")
    monkeypatch.setattr("surgery.checkpoint.reading.os.open", refuse)
    with Reader(checkpoint) as reader, pytest.raises(AccessError, match="no right"):
        reader.read("fp32")
    with pytest.raises(AccessError, match="no right"):
        file_sha256(folder / "model.safetensors")


# In an interpreter of its own: what others freed would be used again, and no growth seen.
MEMORY = """
import sys
from pathlib import Path
from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import Reader

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

with Reader(open_checkpoint(Path(sys.argv[1]), "aligned")) as reader:
    before = anonymous()
    pieces = max(anonymous() for _ in reader.raw("w", 1 << 20)) - before
    held = reader.read("w")
    print(pieces, anonymous() - before, bool(held.any()))
"""


def test_pieces_do_not_take_the_memory_of_the_whole(tmp_path):
    size = 64 << 20
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    pieces, whole, filled = done.stdout.split()
    assert int(pieces) < size // 4
    assert int(whole) > size * 3 // 4
    assert filled == "False"


@pytest.mark.parametrize("size", [0, 13, (1 << 20) + 7])
def test_the_hashes_of_a_file_are_those_of_its_bytes_through_links(tmp_path, size):
    content = random.Random(size).randbytes(size) + b"end"
    (tmp_path / "blob").write_bytes(content)
    (tmp_path / "link").symlink_to("blob")
    assert file_sha256(tmp_path / "link") == hashlib.sha256(content).hexdigest()
    assert file_sha256(tmp_path / "link") != hashlib.sha256(content[:-1]).hexdigest()
    assert file_checksum(tmp_path / "link") == xxhash.xxh3_128_hexdigest(content)
    for digest in (file_sha256, file_checksum):
        with pytest.raises(InputError):
            digest(tmp_path / "missing")
