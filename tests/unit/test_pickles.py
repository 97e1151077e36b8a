import collections
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.pickles import load_pickle, pickle_header
from surgery.checkpoint.reader import Reader
from surgery.errors import InputError, SurgeryError

STATE = {"w": torch.arange(15.0).reshape(3, 5), "b": torch.ones(4, dtype=torch.bfloat16)}


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path, pattern):
    with pytest.raises(InputError, match=pattern) as caught:
        load_pickle(path, "aligned/pytorch_model.bin")
    assert str(caught.value).isprintable()
    assert "aligned/pytorch_model.bin" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read(tmp_path, zipped):
    torch.save(collections.OrderedDict(STATE), tmp_path / "x", _use_new_zipfile_serialization=zipped)
    found = load_pickle(tmp_path / "x", "x")
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_named_and_not_run(tmp_path, zipped):
    made = tmp_path / "made"
    torch.save({**STATE, "x": Runs(made)}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "x", r"run code \(posix.mkdir\)")
    assert not made.exists()
    torch.load(tmp_path / "x", weights_only=False)
    assert made.exists()


def test_a_plain_pickle_is_not_run_either(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "x").write_bytes(pickle.dumps(Runs(made)))
    refused(tmp_path / "x", "aligned")
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.ones(2), "step": 3},
        {"state_dict": STATE},
        {1: torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.empty(2, 3, device="meta")},
    ],
    ids=["number", "nested", "number as name", "list", "tensor", "sparse", "meta"],
)
def test_anything_but_plain_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x")
    with pytest.raises(InputError):
        pickle_header(tmp_path / "x", "aligned/x", file="x")


def test_a_tensor_larger_than_its_file_is_refused_unread(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "x")
    refused(tmp_path / "x", "claims more bytes")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "x")
    with (
        zipfile.ZipFile(tmp_path / "x") as old,
        zipfile.ZipFile(tmp_path / "y", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "y", "compressed")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle", b"\x80\x02}q\x00.", b"\0" * 99])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", "damaged|more than tensors|no tensors")


def test_views_and_shared_memory_are_read_as_tensors_of_their_own(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "t": whole.T,
        "cut": whole[1:3, ::2],
        "one": whole,
        "same": whole,
        "parameter": torch.nn.Parameter(whole),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, "aligned", allow_pickle=True)
    with Reader(checkpoint) as reader:
        for name, tensor in state.items():
            expected = tensor.detach().contiguous()
            assert torch.equal(reader.read(name), expected)
            assert reader.read(name).is_contiguous()
            assert b"".join(reader.raw(name, 10)) == bytes(expected.view(-1).view(torch.uint8).tolist())
            assert checkpoint.tensors[name].nbytes == expected.numel() * 4


def test_the_header_of_a_pickle_is_that_of_the_safetensors_it_becomes(tmp_path):
    torch.save(STATE, tmp_path / "x")
    header = pickle_header(tmp_path / "x", "x", file="x")
    assert (header.length, header.raw, header.metadata) == (0, b"", {})
    assert [(tensor.name, tensor.dtype, tensor.start, tensor.nbytes) for tensor in header.tensors] == [
        ("w", "F32", 0, 60),
        ("b", "BF16", 60, 8),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickles")
    torch.save(STATE, folder / "zip")
    torch.save(STATE, folder / "legacy", _use_new_zipfile_serialization=False)
    return folder


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_mutated_pickle_is_refused_or_read_and_nothing_else(saved, data):
    content = bytearray((saved / data.draw(st.sampled_from(["zip", "legacy"]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (saved / "mutated").write_bytes(content)
    found, refusal = {}, ""
    try:
        found = load_pickle(saved / "mutated", "mutated")
    except SurgeryError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
