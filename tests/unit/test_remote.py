"""Checkpoints whose weights stay on the Hub: planned from headers, read by range, against a Hub on loopback."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import pytest
import remote_models
import torch
from remote_models import TOKEN, Fault, failure, read_one, tensors

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.sidecars import list_sidecars
from surgery.errors import AccessError, InputError
from surgery.hub import fetch, resolve
from surgery.hub.remote import RemoteShard, disk_need, open_source, recorded_sha256
from surgery.hub.remote_reader import RemoteReader
from surgery.testing import write_checkpoint

made = remote_models.made
aligned = remote_models.aligned

WEIGHTS = r"\.safetensors$|/[0-9a-f]{64}$"


def weights_sent(hub):
    return hub.sent(WEIGHTS)


# Planned from headers


def test_a_plan_reads_headers_and_not_a_byte_of_a_tensor(hub, made):
    source = resolve("org/aligned", weights="stream")
    assert weights_sent(hub) == 0, "naming a source reads no weight file at all"
    checkpoint = open_source(source)
    assert weights_sent(hub) == sum(shard.header.length for shard in checkpoint.shards) < 4096
    assert not list(source.folder.rglob("*.safetensors"))
    local = open_checkpoint(made["aligned"], "x")
    assert checkpoint.tensors == local.tensors
    assert [shard.header for shard in checkpoint.shards] == [shard.header for shard in local.shards]
    assert (checkpoint.config, checkpoint.index) == (local.config, local.index)
    assert list_sidecars(checkpoint).carried == list_sidecars(local).carried
    fetch(source)
    assert weights_sent(hub) > 50_000, "the control: weights that are fetched are counted"


def test_a_single_file_is_planned_like_shards(hub, made, tmp_path):
    folder = write_checkpoint(tmp_path / "one", tensors(), {}, shards=1)
    hub.create("org/one").commit_folder(folder)
    checkpoint = open_source(resolve("org/one", weights="stream"))
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert checkpoint.tensors == open_checkpoint(folder, "x").tensors
    assert torch.equal(read_one(checkpoint), tensors()["embed.weight"])


def test_files_are_pinned_and_carry_what_the_hub_states(hub, made):
    source = resolve("org/aligned", weights="stream")
    commit = hub.repositories["org/aligned"].refs["main"]
    assert (source.commit, source.label) == (commit, f"org/aligned@{commit}")
    tree = hub.repositories["org/aligned"].trees[commit]
    hub.repositories["org/aligned"].commit({"model.safetensors.index.json": b"{}"})
    checkpoint = open_source(source)
    assert len(checkpoint.shards) == 5
    for shard in checkpoint.shards:
        assert isinstance(shard, RemoteShard)
        assert recorded_sha256(shard) == tree[shard.name].sha256
    assert recorded_sha256(open_checkpoint(made["aligned"], "x").shards[0]) is None


def test_the_disk_that_is_needed_is_that_of_the_largest_shards(aligned, made):
    sizes = sorted(path.stat().st_size for path in made["aligned"].glob("*.safetensors"))
    assert disk_need(aligned.shards) == sum(sizes[-2:]) < sum(sizes)
    assert disk_need(aligned.shards, ahead=0) == sizes[-1]
    assert disk_need(aligned.shards[:1]) == aligned.shards[0].header.size
    assert disk_need(open_checkpoint(made["aligned"], "x").shards) == 0


def test_an_index_that_names_a_file_the_repository_lacks_is_refused(hub, made):
    hub.repositories["org/aligned"].commit({}, delete=["model-00003-of-00005.safetensors"])
    source = resolve("org/aligned", weights="stream")
    assert "model-00003-of-00005.safetensors" in failure(InputError, lambda: open_source(source))
    assert weights_sent(hub) == 0


def test_an_index_that_leads_out_of_the_folder_is_refused(hub, made):
    index = json.dumps({"weight_map": {"x": "../../x.safetensors"}}).encode()
    hub.repositories["org/aligned"].commit({"model.safetensors.index.json": index})
    source = resolve("org/aligned", weights="stream")
    assert "plain names" in failure(InputError, lambda: open_source(source))
    repository = hub.repositories["org/aligned"]
    repository.trees[repository.refs["main"]]["../../x.safetensors"] = hub_server.Blob(b"x" * 100, large=True)
    failure(AccessError, lambda: open_source(resolve("org/aligned", weights="stream")))
    assert weights_sent(hub) == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 7 + b"\x7f", (1 << 60).to_bytes(8, "little"), b"\x04\0\0\0\0\0\0\0{}  "],
)
def test_a_damaged_header_is_refused_and_not_read_on(content, hub, made):
    hub.repositories["org/aligned"].commit({"model-00002-of-00005.safetensors": content})
    source = resolve("org/aligned", weights="stream")
    text = failure(InputError, lambda: open_source(source))
    assert "model-00002-of-00005.safetensors" in text or "tensor" in text


def test_pickles_are_not_streamed_and_are_not_deferred(hub, made):
    hub.create("org/old").commit({"pytorch_model.bin": b"pickle"})
    ask = lambda weights: resolve("org/old", allow_pickle=True, weights=weights)  # noqa: E731
    assert "--stream" in failure(InputError, lambda: ask("stream"))
    assert hub.fetched("org/old") == set()
    assert ask("defer").weights == ()
    assert hub.fetched("org/old") == {"pytorch_model.bin"}


def test_folders_and_the_embedded_pair_have_nothing_to_stream(hub, made):
    for name in (made["base"], "demo:base"):
        source = resolve(name, weights="stream")
        assert source == resolve(name)
        assert open_source(source).tensors == open_checkpoint(source.folder, "x").tensors
    assert not hub.seen


# Deferred


def test_what_was_planned_from_headers_can_be_read_once_it_is_fetched(hub, made, offline):
    source = resolve("org/aligned", weights="defer")
    checkpoint = open_source(source)
    hub.repositories["org/aligned"].commit({"README.md": b"# Moved on"})
    whole = fetch(source)
    assert (whole.commit, whole.folder, whole.weights) == (source.commit, source.folder, ())
    with Reader(checkpoint) as reader:
        assert torch.equal(reader.read("embed.weight"), tensors(1)["embed.weight"])
    assert fetch(whole) is whole
    offline()
    assert resolve("org/aligned") == whole, "the branch is known to mean what was fetched by its name"


def test_weights_that_are_cached_are_not_left_on_the_hub(hub, made, offline):
    whole = resolve("org/aligned")
    before = len(hub.seen)
    assert resolve("org/aligned", weights="stream") == resolve("org/aligned", weights="defer") == whole
    assert not [seen for seen in hub.seen[before:] if seen.origin == "storage"]
    offline()
    assert resolve("org/aligned", weights="stream") == whole
    next(whole.folder.glob("*-00001-*")).unlink()
    assert "HF_HUB_OFFLINE" in failure(AccessError, lambda: resolve("org/aligned", weights="stream"))


def test_planning_does_not_spoil_what_is_known_of_a_branch_offline(hub, made, offline):
    whole = resolve("org/aligned")
    hub.repositories["org/aligned"].commit({"model-00001-of-00005.safetensors": b"other"})
    assert resolve("org/aligned", weights="stream").weights
    offline()
    assert resolve("org/aligned") == whole


# Read by range


def test_every_tensor_is_exact_and_nothing_else_is_read(hub, aligned):
    before = weights_sent(hub)
    with RemoteReader(aligned) as reader, ThreadPoolExecutor(4) as pool:
        found = dict(zip(aligned.tensors, pool.map(reader.read, aligned.tensors), strict=True))
    assert weights_sent(hub) - before == aligned.total_bytes
    expected = tensors(1)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert not torch.equal(found["embed.weight"], tensors(0)["embed.weight"]), "the control"


def test_pieces_are_exact_whatever_their_size(aligned, made):
    with RemoteReader(aligned) as remote, Reader(open_checkpoint(made["aligned"], "x")) as local:
        for name in ("embed.weight", "scalar", "empty", "mask"):
            whole = b"".join(local.raw(name))
            assert b"".join(remote.raw(name)) == whole
            pieces = list(remote.raw(name, 20_001))
            assert b"".join(pieces) == whole
            assert max(map(len, pieces), default=0) <= 20_001


def test_a_base_that_is_sharded_differently_is_read_by_name(hub, aligned):
    base = open_source(resolve("org/base", weights="stream"))
    assert len(base.shards) != len(aligned.shards)
    assert any(base.tensors[name].file != info.file for name, info in aligned.tensors.items())
    expected = tensors(0)
    with RemoteReader(base) as reader:
        for name in aligned.tensors:
            assert torch.equal(reader.read(name), expected[name])
        assert reader.info("ids") == base.tensors["ids"]
        with pytest.raises(InputError, match="no tensor"):
            reader.read("none")


def test_a_folder_is_read_from_disk(hub, made):
    with RemoteReader(open_checkpoint(made["base"], "x")) as reader:
        assert torch.equal(reader.read("embed.weight"), tensors(0)["embed.weight"])
    assert not hub.seen


# Secrets


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, made, monkeypatch, caplog, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    hub.repositories["org/aligned"].private = True
    before = len(hub.seen)
    with caplog.at_level("DEBUG"):
        source = resolve("org/aligned", weights="stream")
        checkpoint = open_source(source)
        with RemoteReader(checkpoint) as reader:
            for name in ("embed.weight", "embed.weight", "ids"):
                assert torch.equal(reader.read(name), tensors(1)[name])
        assert [seen.origin for seen in hub.seen].count("storage") > len(checkpoint.shards) * 2 + 2
        for fault in (Fault("/resolve/", status=500), Fault("/[0-9a-f]{64}$", keep=3)):
            hub.faults[:] = [fault]
            failure(AccessError, lambda: read_one(checkpoint))
    sent = {
        (seen.origin, seen.headers.get("authorization"))
        for seen in hub.seen[before:]
        if "agent" not in seen.path
    }
    assert sent == {("hub", f"Bearer {TOKEN}"), ("storage", None)}
    assert TOKEN not in repr((source, checkpoint)) + caplog.text + "".join(capsys.readouterr())
    for path in Path("cache").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_token_that_cannot_be_sent_is_not_shown(hub, aligned, monkeypatch):
    for token in ("hf_s\N{EURO SIGN}cret", "hf_secret\x07bell"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "cret" not in failure(AccessError, lambda: read_one(aligned))


def test_planning_imports_nothing_heavy_until_the_hub_is_needed():
    code = (
        "import sys; import surgery.hub.remote;"
        "assert not {'torch', 'huggingface_hub', 'httpx', 'httpx2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_folders_of_the_test_are_not_what_is_read(made, aligned):
    shutil.rmtree(made["aligned"])
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
