"""A pair on the loopback Hub, and tensors read from it."""

import hub_server
import pytest
import torch

from surgery.errors import SurgeryError
from surgery.hub import ranges, resolve
from surgery.hub.remote import open_source
from surgery.hub.remote_reader import RemoteReader
from surgery.testing import write_checkpoint

Fault = hub_server.Fault
TOKEN = "hf_secretsecretsecretsecretsecret12"


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        f"layers.{number}.weight": torch.randn((97 + number, 61), generator=generator).bfloat16()
        for number in range(7)
    }
    return made | {
        "embed.weight": torch.randn((301, 61), generator=generator),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty((0, 4)),
        "ids": torch.arange(13),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def made(hub, tmp_path, monkeypatch):
    """`org/aligned` in five shards and `org/base` in two, and the folders they were made from."""
    monkeypatch.setattr(ranges, "_WAITS", (0.0, 0.0, 0.0, 0.0))
    folders = {}
    for seed, (name, shards) in enumerate((("base", 2), ("aligned", 5))):
        folder = write_checkpoint(tmp_path / "made" / name, tensors(seed), {"a": name}, shards=shards)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("# A card")
        hub.create(f"org/{name}").commit_folder(folder, {"x.gguf": b"x" * 100_000})
        folders[name] = folder
    return folders


@pytest.fixture
def aligned(made):
    """The aligned checkpoint, its weights on the Hub."""
    return open_source(resolve("org/aligned", weights="stream"))


def failure(kind, read):
    """The message of the error that reading ends in: one line, without secrets."""
    with pytest.raises(SurgeryError) as caught:
        read()
    assert type(caught.value) is kind, caught.value
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def read_one(checkpoint, name="embed.weight"):
    with RemoteReader(checkpoint) as reader:
        return reader.read(name)


def stored(checkpoint, name="embed.weight"):
    """A pattern for the path under which storage has the file of a tensor."""
    return f"/{shard_of(checkpoint, name).remote.sha256}$"


def shard_of(checkpoint, name):
    return next(shard for shard in checkpoint.shards if shard.name == checkpoint.tensors[name].file)
