"""Checkpoints whose weights stay on the Hub: planned from headers, read by range, against a Hub on loopback."""

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import pytest
import torch

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.sidecars import list_sidecars
from surgery.errors import AccessError, InputError, SurgeryError
from surgery.hub import fetch, ranges, resolve
from surgery.hub.remote import RemoteShard, disk_need, open_source, recorded_sha256
from surgery.hub.remote_reader import RemoteReader
from surgery.testing import write_checkpoint

Fault = hub_server.Fault
TOKEN = "hf_secretsecretsecretsecretsecret12"
WEIGHTS = r"\.safetensors$|/[0-9a-f]{64}$"


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


def weights_sent(hub):
    return hub.sent(WEIGHTS)


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


# Trouble on the way


@pytest.mark.parametrize("keep", [0, 1, 30_000])
def test_a_connection_that_drops_is_taken_up_where_it_broke(keep, hub, aligned):
    hub.faults.append(Fault(stored(aligned), keep=keep, times=2))
    before = len(hub.seen)
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    tries = [seen for seen in hub.seen[before:] if seen.origin == "storage"]
    info = aligned.tensors["embed.weight"]
    assert [seen.headers["range"] for seen in tries] == [
        f"bytes={info.start + number * keep}-{info.start + info.nbytes - 1}" for number in range(3)
    ]
    assert sum(seen.sent for seen in tries) == info.nbytes


def test_a_connection_that_keeps_dropping_is_an_error_after_a_few_tries(hub, aligned):
    hub.faults.append(Fault(stored(aligned), keep=10))
    text = failure(AccessError, lambda: read_one(aligned))
    assert "5 times in a row" in text
    assert shard_of(aligned, "embed.weight").name in text
    assert 1_000_000 - hub.faults[0].times == 5
    hub.faults.clear()
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])


def test_tries_are_counted_anew_once_much_has_come(hub, aligned, monkeypatch):
    monkeypatch.setattr(ranges, "_PROGRESS", 1000)
    hub.faults.append(Fault(stored(aligned), keep=1000, times=9))
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    monkeypatch.setattr(ranges, "_PROGRESS", 1001)
    hub.faults.append(Fault(stored(aligned), keep=1000, times=9))
    failure(AccessError, lambda: read_one(aligned))


def test_a_hub_that_goes_away_or_never_answers_is_an_error(hub, aligned, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.append(Fault("/resolve/", silent=True))
    assert "broke off" in failure(AccessError, lambda: read_one(aligned))
    hub.close()
    assert "broke off" in failure(AccessError, lambda: read_one(aligned))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_trouble_is_waited_out(status, hub, aligned, slept):
    hub.faults.append(Fault("/resolve/", status=status, headers={"Retry-After": "3"}, times=2))
    file = shard_of(aligned, "embed.weight").remote
    info = aligned.tensors["embed.weight"]
    found = ranges.read_bytes(file, info.start, info.nbytes)
    assert found == bytes(tensors(1)["embed.weight"].numpy().data.cast("B"))
    assert sum(slept[threading.get_ident()]) == 6


@pytest.mark.parametrize(
    ("status", "headers", "part", "tries"),
    [
        (401, {}, "log in", 1),
        (403, {}, "does not let", 1),
        (404, {}, "no model", 1),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated", 1),
        (404, {"X-Error-Code": "EntryNotFound"}, "any more", 1),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision", 1),
        (429, {"Retry-After": "3600"}, "no more requests", 1),
        (429, {}, "no more requests", 5),
        (500, {}, "answered 500", 5),
        (503, {}, "answered 503", 5),
    ],
)
def test_lasting_trouble_ends_in_its_own_message(status, headers, part, tries, hub, aligned):
    hub.faults.append(Fault("/resolve/", status=status, headers=headers, body=b"<html>trouble</html>"))
    text = failure(AccessError, lambda: read_one(aligned))
    assert part in text
    assert "org/aligned" in text
    assert "html" not in text
    assert 1_000_000 - hub.faults[0].times == tries


def test_a_limit_of_requests_is_waited_out_as_the_hub_says(hub, aligned, slept):
    file = shard_of(aligned, "ids").remote
    headers = {
        "RateLimit": '"resolvers";r=0;t=200',
        "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
    }
    hub.faults.append(Fault("/resolve/", status=429, headers=headers, times=1))
    assert len(ranges.read_bytes(file, 0, 8)) == 8
    assert slept[threading.get_ident()] == [200]
    hub.faults.append(Fault("/resolve/", status=429, headers={"RateLimit": '"resolvers";r=0;t=400'}))
    assert "no more requests" in failure(AccessError, lambda: ranges.read_bytes(file, 0, 8))
    assert slept[threading.get_ident()] == [200]


def test_the_hub_is_asked_once_for_each_file_until_storage_refuses(hub, aligned):
    begin = len(hub.seen)
    with RemoteReader(aligned) as reader:
        for name, tensor in tensors(1).items():
            assert torch.equal(reader.read(name), tensor)
        seen = hub.seen[begin:]
        assert len([one for one in seen if one.origin == "hub"]) == len(aligned.shards)
        assert len([one for one in seen if one.origin == "storage"]) == len(tensors()) - 1, "one has no bytes"
        begin = len(hub.seen)
        hub.faults.append(Fault(stored(aligned), status=403, body=b"<Error>expired</Error>", times=1))
        assert torch.equal(reader.read("embed.weight"), tensors(1)["embed.weight"])
        assert [one.origin for one in hub.seen[begin:]] == ["storage", "hub", "storage"]
        begin = len(hub.seen)
        hub.faults.append(Fault(stored(aligned), keep=5, times=1))
        assert torch.equal(reader.read("embed.weight"), tensors(1)["embed.weight"])
        assert [one.origin for one in hub.seen[begin:]] == ["storage", "hub", "storage"], "a broken one, too"
        hub.faults.append(Fault(stored(aligned), status=403, body=b"<Error>no</Error>"))
        assert "does not let" in failure(AccessError, lambda: reader.read("embed.weight"))


def test_rights_that_end_on_the_way_are_told(hub, aligned):
    hub.repositories["org/aligned"].gated = True
    assert f"{hub.url}/org/aligned" in failure(AccessError, lambda: read_one(aligned))
    hub.repositories["org/aligned"].gated = False
    hub.repositories["org/aligned"].private = True
    assert "log in" in failure(AccessError, lambda: read_one(aligned))


SPAN = "bytes {start}-{end}/{size}"


@pytest.mark.parametrize(
    ("status", "span", "headers", "kind", "part"),
    [
        (416, "bytes */5", {}, InputError, "shorter"),
        (206, "bytes {start}-{end}/5", {}, InputError, "5 bytes"),
        (206, "bytes 0-{end}/{size}", {}, AccessError, "wrong part"),
        (206, "bytes {start}-{size}/{size}", {}, AccessError, "wrong part"),
        (206, "", {}, AccessError, "wrong part"),
        (200, "", {}, AccessError, "without --stream"),
        (204, "", {}, AccessError, "without --stream"),
        (206, SPAN, {"Content-Encoding": "gzip"}, AccessError, "without --stream"),
        (206, SPAN, {"X-Repo-Commit": "f" * 40}, InputError, "commit ffff"),
        (206, SPAN, {"X-Linked-Etag": '"other"'}, InputError, "ETag"),
        (206, SPAN, {"X-Repo-Commit": "{commit}", "ETag": 'W/"other"'}, InputError, "ETag"),
    ],
)
def test_an_answer_that_is_not_the_planned_part_is_refused(status, span, headers, kind, part, hub, aligned):
    info = aligned.tensors["embed.weight"]
    shard = shard_of(aligned, info.name)
    values = {
        "start": info.start,
        "end": info.start + info.nbytes - 1,
        "size": shard.header.size,
        "commit": shard.remote.commit,
    }
    sent = {name: value.format(**values) for name, value in {"Content-Range": span, **headers}.items()}
    hub.faults.append(Fault(stored(aligned), status=status, headers=sent, body=b"\0" * info.nbytes))
    assert part in failure(kind, lambda: read_one(aligned))
    assert 1_000_000 - hub.faults[0].times == 1
    hub.faults[0] = Fault(
        stored(aligned),
        status=206,
        headers={"Content-Range": SPAN.format(**values), "X-Repo-Commit": shard.remote.commit,
                 "ETag": f'W/"{shard.remote.etag}"', "X-Linked-Etag": shard.remote.etag},
        body=b"\0" * info.nbytes,
    )  # fmt: skip
    assert not read_one(aligned).any(), "the control: the right headers are believed"


def test_an_answer_with_less_than_it_says_is_asked_for_the_rest(hub, aligned):
    info = aligned.tensors["embed.weight"]
    span = f"bytes {info.start}-{info.start + 9}/{shard_of(aligned, info.name).header.size}"
    content = tensors(1)["embed.weight"].numpy().tobytes()
    hub.faults.append(
        Fault(stored(aligned), status=206, headers={"Content-Range": span}, body=content[:10], times=1)
    )
    assert torch.equal(read_one(aligned), tensors(1)["embed.weight"])
    hub.faults.append(Fault(stored(aligned), status=206, headers={"Content-Range": span}, body=content))
    assert "wrong part" in failure(AccessError, lambda: read_one(aligned))


def test_more_than_was_asked_for_is_not_taken(aligned):
    file = shard_of(aligned, "ids").remote
    ranges._check_piece(b"12", file, 2, None)
    assert "more of" in failure(AccessError, lambda: ranges._check_piece(b"123", file, 2, None))


def test_a_file_that_was_replaced_on_the_hub_is_found(hub, aligned):
    shard = shard_of(aligned, "embed.weight")
    tree = hub.repositories["org/aligned"].trees[shard.remote.commit]
    tree[shard.name] = hub_server.Blob(b"\0" * shard.header.size, large=True)
    assert "changed on the Hub" in failure(InputError, lambda: read_one(aligned))
    assert read_one(aligned, "ids").equal(torch.arange(13)), "the control: other files are as they were"


def test_reading_ends_when_the_reader_is_closed(hub, aligned, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault(stored(aligned), silent=True))
    with ThreadPoolExecutor(1) as pool:
        with RemoteReader(aligned) as reader:
            future = pool.submit(reader.read, "embed.weight")
            while hub.faults[0].times == 1_000_000:
                threading.Event().wait(0.005)
        assert "stopped" in failure(AccessError, future.result)


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
