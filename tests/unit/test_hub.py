"""Sources, the Hub among them: the real client, in this process, against a Hub on loopback."""

from pathlib import Path

import hub_models
import hub_server
import pytest
import torch
from hub_models import CONFIG, INDEX, SHARDS, TOKEN, WANTED, failure, files, index_of

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.sidecars import list_sidecars
from surgery.errors import InputError, UsageError
from surgery.hub import refusals, resolve
from surgery.testing import write_checkpoint

model = hub_models.model


# What is fetched


def test_only_what_an_edit_needs_is_fetched(hub, model):
    source = resolve("org/model")
    assert files(source) == WANTED
    assert hub.fetched() == WANTED
    assert (source.folder / SHARDS[1]).read_bytes() == b"second" * 100
    assert (source.folder / SHARDS[0]).is_symlink(), "the control: a cache of links was made"


def test_a_single_file_is_fetched_where_there_is_no_index(hub, model):
    model.commit({}, delete=[INDEX])
    assert files(resolve("org/model")) == WANTED - {INDEX, *SHARDS} | {"model.safetensors"}


def test_pickles_are_fetched_when_allowed_and_nothing_better_is_there(hub, model):
    assert "pytorch_model.bin" not in files(resolve("org/model", allow_pickle=True))
    model.commit({}, delete=[INDEX, *SHARDS, "model.safetensors", "model.fp16.safetensors"])
    before = hub.fetched()
    assert "pytorch_model.bin" in failure("org/model", InputError)
    assert hub.fetched() == before, "a model that cannot be used is not fetched"
    found = files(resolve("org/model", allow_pickle=True))
    assert "pytorch_model.bin" in found
    assert "training_args.bin" not in found


def test_sharded_pickles_are_those_of_their_index(hub):
    hub.create("org/old").commit(
        {
            "pytorch_model.bin.index.json": index_of("pytorch_model-1.bin"),
            "pytorch_model-1.bin": b"x",
            "y.bin": b"y",
        }
    )
    assert files(resolve("org/old", allow_pickle=True)) == {
        "pytorch_model.bin.index.json",
        "pytorch_model-1.bin",
    }


def test_a_repository_of_another_format_is_refused_before_anything_is_fetched(hub):
    hub.create("org/quantised").commit({"config.json": CONFIG, "a.gguf": b"x" * 1000})
    assert "GGUF" in failure("org/quantised", InputError)
    hub.create("org/adapter").commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    assert "adapter" in failure("org/adapter", InputError)
    hub.create("org/empty").commit({"README.md": b""})
    assert "no weights" in failure("org/empty", InputError)
    assert hub.fetched() == set()


def test_everything_that_is_carried_is_fetched(hub, tmp_path):
    """The rule for side files stands elsewhere; a file it carries must not be missing from a snapshot."""
    base = write_checkpoint(
        tmp_path / "base", {"weight": torch.zeros(3, 2)}, {"model_type": "llama"}, shards=1
    )
    names = [
        "generation_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt",
        "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/rag.jinja", "preprocessor_config.json",
        "LICENSE", "LICENSE.txt", "NOTICE", "Notice.pdf", "USE_POLICY.md", "legal/LICENSE-2.0.html", "modeling_x.py",
        "deep/er/code.py", "optimizer.py", "added_tokens.json", "video_preprocessor_config.json", "COPYING",
        "runs/x.py", "checkpoint-5/x.py", "weights.gguf", "notes.txt",
    ]  # fmt: skip
    for name in names:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    carried = set(list_sidecars(open_checkpoint(base, "base")).carried)
    assert len(carried) > 20
    hub.create("org/full").commit_folder(base)
    source = resolve("org/full")
    assert carried <= files(source)
    assert set(list_sidecars(open_checkpoint(source.folder, "x")).carried) == carried
    assert "weights.gguf" not in files(source)


def test_a_shard_that_is_not_in_the_repository_is_found_when_the_checkpoint_is_opened(hub, model):
    model.commit({}, delete=[SHARDS[1]])
    source = resolve("org/model")
    assert SHARDS[1] not in files(source)
    model.commit({INDEX: b'{"weight_map": [1, 2]}'})
    assert INDEX in files(resolve("org/model"))
    model.commit({INDEX: b"not json"})
    assert INDEX in failure("org/model", InputError)


def test_names_that_lead_out_of_the_cache_are_refused(hub, model, tmp_path):
    model.trees[model.refs["main"]]["a/../../../../../escaped.txt"] = hub_server.Blob(b"x", large=False)
    failure("org/model")
    assert not list(tmp_path.rglob("escaped.txt"))


# Pinned


def test_branches_tags_and_commits_are_pinned_to_the_commit(hub, model):
    first = model.refs["main"]
    model.refs["v1"] = first
    second = model.commit({"config.json": b'{"new": 1}'}, branch="wip/fast")
    third = model.commit({"config.json": b'{"newer": 1}'})
    expected = {None: third, "main": third, "v1": first, "wip/fast": second, first: first, second[:8]: second}
    assert len(set(expected.values())) == 3
    for revision, commit in expected.items():
        for prefix in ("", "hf://", "hf://models/"):
            name = "org/model" + (f"@{revision}" if revision else "")
            source = resolve(prefix + name)
            assert (source.repository, source.commit) == ("org/model", commit)
            assert source.label == f"org/model@{commit}"
            assert source.folder.name == commit


def test_what_is_cached_is_not_fetched_again(hub, model):
    first = resolve("org/model")
    before = len(hub.seen)
    assert resolve("org/model") == resolve(f"org/model@{first.commit}") == first
    assert [seen.path for seen in hub.seen[before:]] == [
        "/api/models/org/model",
        f"/api/models/org/model/revision/{first.commit}",
    ]
    fresh = model.commit({"README.md": b"# Better"})
    before = len(hub.seen)
    assert resolve("org/model").commit == fresh
    assert not [seen for seen in hub.seen[before:] if seen.origin == "storage"], "the shards are shared"


# A folder wins


def test_a_folder_wins_over_a_repository_of_the_same_name(hub, model, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    source = resolve("org/model")
    assert (source.repository, source.commit, source.label) == (None, None, "model")
    assert not hub.seen
    assert resolve("hf://org/model").repository == "org/model", "the control: the prefix means the Hub"
    assert resolve("org/model@main").repository == "org/model"


def test_labels_of_folders_are_their_names(tmp_path, monkeypatch):
    (tmp_path / "some model").mkdir()
    monkeypatch.chdir(tmp_path / "some model")
    for spelled in (".", "../some model", tmp_path / "some model", str(tmp_path / "some model") + "/"):
        assert resolve(spelled).label == "some model"
        assert resolve(spelled).folder.samefile(tmp_path / "some model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/some model").label == "some model"
    assert resolve("..").label == tmp_path.name


# What a user may type wrong


@pytest.mark.parametrize(
    "name", ["hf://x", "hf://", "hf://org/model@", "hf://datasets/org/x", "hf://org/m@../../x", "hf://a/b/c", "",
             "org/a--b", "org/model.git"]
)  # fmt: skip
def test_what_can_be_no_name_is_a_usage_error(name, hub):
    text = failure(name, UsageError)
    assert name in text
    assert not hub.seen


@pytest.mark.parametrize(
    "name", ["nowhere", "./org/model", "../x", "~/nowhere", "/no/where", "a/b/c", "org/model@", "org/m@../../x",
             "org/model@/x", "https://huggingface.co/org/model", "org/a b", "-x/y", "x" * 5000, "a\0b"]
)  # fmt: skip
def test_what_can_only_be_a_folder_and_is_none_is_an_input_error(name, hub):
    failure(name, InputError)
    assert not hub.seen


def test_a_file_and_a_broken_link_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/model").write_text("x")
    assert "is a file" in failure("org/model", InputError)
    Path("org/link").symlink_to("nothing")
    assert "link to nothing" in failure("org/link", InputError)


def test_an_unknown_embedded_model_is_answered_with_the_two():
    text = failure("demo:xyz", InputError)
    assert "demo:base" in text
    assert "demo:aligned" in text


@pytest.mark.parametrize(
    "address", ["localhost:80", "nonsense", "http://[bad", "http://x:99999", "ftp://x", ""]
)
def test_an_address_that_is_none_is_a_usage_error(address, hub, model, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "HF_ENDPOINT" in failure("org/model", UsageError)


# Rights


def test_a_gated_model_names_the_page_where_its_terms_are(hub, model, monkeypatch):
    model.gated = True
    page = f"{hub.url}/org/model"
    assert page in failure("org/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    assert page in failure("org/model@main")
    hub.granted.add(TOKEN)
    assert files(resolve("org/model")) == WANTED


def test_a_missing_or_private_repository_and_a_missing_revision_are_named(hub, model, monkeypatch):
    model.private = True
    for name in ("org/model", "org/nothing"):
        text = failure(name)
        assert name in text
        assert "no folder" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    assert "org/nothing" in failure("org/nothing")
    assert "no-such" in failure("org/model@no-such")
    assert "0" * 40 in failure("org/model@" + "0" * 40)
    assert resolve("org/model").commit == model.refs["main"]


def test_a_token_the_hub_does_not_know_is_said_to_be_so(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "does not know the token" in failure("org/model")


@pytest.mark.parametrize("token", ["hf_s\N{EURO SIGN}cret", "hf_secret\nsecret", "hf_secret\x07bell"])
def test_a_token_that_cannot_be_sent_is_not_shown(token, hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    assert "cret" not in failure("org/model")


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, model, monkeypatch, caplog, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    source = resolve("org/model")
    sent = {seen.origin: seen.headers.get("authorization") for seen in hub.seen if "agent" not in seen.path}
    assert sent == {"hub": f"Bearer {TOKEN}", "storage": None}
    assert TOKEN not in repr(source) + caplog.text + "".join(capsys.readouterr())
    for path in source.folder.parents[2].rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_secrets_are_taken_out_of_what_the_client_says(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not of the usual form")
    text = "at http://user:pass@host/x with not of the usual form, Bearer abcdef'x and hf_abcdefghijk\nsecond line"
    shown = refusals.detail(ValueError(text))
    assert shown == "at http://***@host/x with ***, Bearer ***'x and ***"
    assert refusals.detail(ValueError("")) == "ValueError"


def test_a_password_in_the_address_is_not_shown(hub, model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://me:passw0rd@127.0.0.1:1/hub")
    text = failure("org/model")
    assert "http://127.0.0.1:1/hub" in text
    assert "passw0rd" not in text
