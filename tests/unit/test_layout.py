import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.layout import INDEX, PICKLE_INDEX, open_checkpoint
from surgery.errors import AccessError, InputError

ONE = {"embed.weight": torch.zeros(7, 3, dtype=torch.bfloat16), "layers.0.weight": torch.ones(3, 5)}
TWO = {"layers.1.weight": torch.ones(5, 3), "norm.weight": torch.ones(3)}
NAMES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder, *, parts=(ONE, TWO), files=NAMES, weight_map=None, **extra):
    for file, part in zip(files, parts, strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(part, folder / file, metadata={"format": "pt"})
    if weight_map is None:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 234}, "weight_map": weight_map, **extra}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "limits": [0.0, Infinity]}')
    return folder


def single(folder, name="model.safetensors"):
    save_file(ONE, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def refused(folder, pattern, error=InputError, **options):
    with pytest.raises(error, match=pattern) as caught:
        open_checkpoint(folder, "aligned", **options)
    assert str(caught.value).isprintable()
    assert "aligned" in str(caught.value)


def test_a_single_file_is_opened(tmp_path):
    checkpoint = open_checkpoint(single(tmp_path), "aligned")
    assert not checkpoint.sharded
    assert checkpoint.index is None
    assert checkpoint.notes == ()
    assert [shard.output_name for shard in checkpoint.shards] == ["model.safetensors"]
    assert checkpoint.tensors["embed.weight"].shape == (7, 3)
    assert checkpoint.total_bytes == 7 * 3 * 2 + 3 * 5 * 4


def test_shards_are_opened_in_the_order_of_their_names(tmp_path):
    checkpoint = open_checkpoint(sharded(tmp_path), "aligned")
    assert checkpoint.sharded
    assert tuple(shard.name for shard in checkpoint.shards) == NAMES
    assert checkpoint.tensors["norm.weight"].file == NAMES[1]
    assert set(checkpoint.tensors) == {*ONE, *TWO}
    assert checkpoint.index["metadata"] == {"total_size": 234}
    assert checkpoint.config["limits"][1] == float("inf")


def test_no_tensor_data_is_read(tmp_path, monkeypatch):
    read = []
    true_preadv = os.preadv

    def counted(descriptor, buffers, offset):
        read.append(offset + sum(map(len, buffers)))
        return true_preadv(descriptor, buffers, offset)

    monkeypatch.setattr("surgery.checkpoint.reading.os.preadv", counted)
    checkpoint = open_checkpoint(single(tmp_path), "aligned")
    assert max(read) == checkpoint.shards[0].header.length


def test_torch_is_not_imported_for_headers(tmp_path):
    single(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from surgery.checkpoint.layout import open_checkpoint\n"
        "from surgery.checkpoint.quantised import refuse_quantised\n"
        "from surgery.checkpoint.sidecars import list_sidecars\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]), 'aligned')\n"
        "refuse_quantised(checkpoint), list_sidecars(checkpoint)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_index_wins_over_a_single_file_and_a_note_says_so(tmp_path):
    single(sharded(tmp_path))
    checkpoint = open_checkpoint(tmp_path, "aligned")
    assert tuple(shard.name for shard in checkpoint.shards) == NAMES
    assert any("the index is used" in note for note in checkpoint.notes)


def test_an_index_may_name_the_single_file(tmp_path):
    sharded(tmp_path, parts=(ONE,), files=("model.safetensors",))
    checkpoint = open_checkpoint(tmp_path, "aligned")
    assert checkpoint.sharded
    assert checkpoint.notes == ()


def test_a_file_outside_the_index_is_not_read(tmp_path):
    sharded(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    assert set(open_checkpoint(tmp_path, "aligned").tensors) == {*ONE, *TWO}


def test_shards_in_a_folder_below_are_read(tmp_path):
    sharded(tmp_path, files=("a/one.safetensors", "b/one.safetensors"))
    checkpoint = open_checkpoint(tmp_path, "aligned")
    assert checkpoint.tensors["norm.weight"].file == "b/one.safetensors"


def test_links_are_followed_as_in_a_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted(sharded(blobs).iterdir())):
        path.rename(blobs / f"{number:02}")
        (snapshot / path.name).symlink_to(f"../blobs/{number:02}")
    assert set(open_checkpoint(snapshot, "aligned").tensors) == {*ONE, *TWO}


def test_no_config_is_a_note(tmp_path):
    single(tmp_path)
    (tmp_path / "config.json").unlink()
    checkpoint = open_checkpoint(tmp_path, "aligned")
    assert checkpoint.config == {}
    assert any("no config.json" in note for note in checkpoint.notes)


@pytest.mark.parametrize("text", ["[]", "{", "\xff", '{"a":' * 9000, '{"a": ' + "1" * 9000 + "}"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (single(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json")


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / NAMES[1]).unlink()
    refused(tmp_path, NAMES[1])


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    single(tmp_path)
    (tmp_path / INDEX).symlink_to(tmp_path / "gone")
    refused(tmp_path, f"{INDEX} is missing")


def test_an_index_naming_an_absent_tensor_is_refused(tmp_path):
    sharded(tmp_path, weight_map={**dict.fromkeys([*ONE, "ghost"], NAMES[0]), **dict.fromkeys(TWO, NAMES[1])})
    refused(tmp_path, "ghost")


def test_an_index_with_tensors_in_the_wrong_file_is_refused(tmp_path):
    sharded(tmp_path, weight_map={**dict.fromkeys(ONE, NAMES[1]), **dict.fromkeys(TWO, NAMES[0])})
    refused(tmp_path, "does not hold it")


def test_a_tensor_of_a_shard_that_is_not_indexed_is_refused(tmp_path):
    sharded(tmp_path, weight_map={**dict.fromkeys(ONE, NAMES[0]), "norm.weight": NAMES[1]})
    refused(tmp_path, "layers.1.weight.*must be indexed")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path, parts=(ONE, {**TWO, "embed.weight": torch.zeros(7, 3)}))
    refused(tmp_path, f"embed.weight .* two files .*{NAMES[0]}")


@pytest.mark.parametrize(
    "file",
    [
        "/tmp/model.safetensors",
        "../model.safetensors",
        "a/../../model.safetensors",
        "a/../model.safetensors",
        "./model.safetensors",
        "a//model.safetensors",
        "",
        ".",
        "..",
        "a\\model.safetensors",
        "a\0model.safetensors",
    ],
)
def test_an_index_path_that_is_not_plainly_below_the_folder_is_refused(tmp_path, file):
    sharded(tmp_path, weight_map={name: file for name in ONE})
    refused(tmp_path, "plain names below its folder")


def test_an_index_naming_another_format_is_refused(tmp_path):
    sharded(tmp_path, weight_map=dict.fromkeys(ONE, "pytorch_model.bin"))
    refused(tmp_path, r"\.safetensors is needed")


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x.safetensors"}, "metadata": []}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        '{"weight_map": {"a": "\\ud800.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_index_is_refused(tmp_path, index):
    (sharded(tmp_path) / INDEX).write_text(index)
    refused(tmp_path, INDEX)


def test_an_index_of_absurd_size_is_refused_unread(tmp_path):
    with open(sharded(tmp_path) / INDEX, "wb") as file:
        file.truncate(10**12)
    refused(tmp_path, "at most 100000000")


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds no tensors")


FOREIGN = {
    "model-Q4_K_M.gguf": "GGUF",
    "adapter_model.safetensors": "adapter only",
    "consolidated.safetensors": "makers' format",
    "consolidated.00.pth": "makers' format",
    "model-00001-of-00002.safetensors": "without an index",
    "model.fp16.safetensors": "without an index",
    "tf_model.h5": "another format",
    "README.md": "no weights",
}


@pytest.mark.parametrize("file", FOREIGN)
def test_a_folder_without_usable_weights_says_what_it_has(tmp_path, file):
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path, FOREIGN[file])


def test_a_missing_folder_a_file_and_an_empty_folder_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "not found")
    refused(tmp_path, "no weights")
    (tmp_path / "model.gguf").write_bytes(b"")
    refused(tmp_path / "model.gguf", "is a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "missing")


def test_no_right_to_list_the_folder_is_an_access_error(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("surgery.checkpoint.layout.os.listdir", refuse)
    refused(tmp_path, "no right to read", AccessError)


def pickled(folder):
    for number, part in enumerate((ONE, TWO), 1):
        torch.save(part, folder / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {
        name: f"pytorch_model-0000{number}-of-00002.bin"
        for number, part in enumerate((ONE, TWO), 1)
        for name in part
    }
    (folder / PICKLE_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_pickled_weights_are_refused_unless_allowed(tmp_path):
    refused(pickled(tmp_path), "--allow-pickle")
    checkpoint = open_checkpoint(tmp_path, "aligned", allow_pickle=True)
    assert [shard.output_name for shard in checkpoint.shards] == list(NAMES)
    assert {shard.kind for shard in checkpoint.shards} == {"pickle"}
    assert checkpoint.tensors["embed.weight"].dtype == "BF16"


def test_safetensors_are_preferred_to_pickles(tmp_path):
    checkpoint = open_checkpoint(sharded(pickled(tmp_path)), "aligned", allow_pickle=True)
    assert {shard.kind for shard in checkpoint.shards} == {"safetensors"}


def test_a_single_pickle_becomes_a_single_safetensors_file(tmp_path):
    torch.save(ONE, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "--allow-pickle")
    checkpoint = open_checkpoint(tmp_path, "aligned", allow_pickle=True)
    assert [shard.output_name for shard in checkpoint.shards] == ["model.safetensors"]


def test_two_pickles_that_would_become_one_file_are_refused(tmp_path):
    for file, part in (("model.bin", ONE), ("pytorch_model.bin", TWO)):
        torch.save(part, tmp_path / file)
    weight_map = {**dict.fromkeys(ONE, "model.bin"), **dict.fromkeys(TWO, "pytorch_model.bin")}
    (tmp_path / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "under one name", allow_pickle=True)
