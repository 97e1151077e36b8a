import os

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.sidecars import list_sidecars
from surgery.errors import AccessError, InputError


def _split(text):
    return text.split()


CARRIED = _split("""
config.json configuration.json generation_config.json chat_template.jinja chat_template.json
additional_chat_templates/tool_use.jinja
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
tokenizer.model tokenizer.model.v3 spiece.model sentencepiece.bpe.model tiktoken.model qwen.tiktoken source.spm
tekken.json normalizer.json preprocessor_config.json processor_config.json video_preprocessor_config.json
image_processor_config.json modeling_x.py configuration_x.py optimizer_x.py code/inner/part.py
LICENSE LICENSE.txt LICENCE.md License.pdf LICENSE-MODEL LICENSE_v1.1.txt LICENSE-2.0 MODEL_LICENSE COPYING
licenses/LICENSE.md NOTICE Notice.txt THIRD_PARTY_NOTICES.txt USE_POLICY.md use-policy.txt acceptable_use.md
""")

LEFT = _split("""
pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json model-Q4.gguf model.onnx model.pt
consolidated.00.pth consolidated.safetensors tf_model.h5 flax_model.msgpack old.ckpt arrays.npz
adapter_model.safetensors adapter_model.bin adapter_config.json model.fp16.safetensors
model.safetensors.index.fp16.json other.safetensors.index.json
training_args.bin trainer_state.json optimizer.pt optimizer.bin scheduler.pt rng_state_0.pth
events.out.tfevents.1.host .env .gitattributes .hidden.py model.sig LICENSE.sig README.md surgery.json
surgery.run.json surgery.tensors.jsonl notes.txt secrets.yaml license.key tokenizer.bak
figures/plot.png figures/config.json params.json code/inner/weights.bin
""")

LEFT_WHOLE = {
    "original/": "tokenizer.model",
    "onnx/": "config.json",
    "runs/": "LICENSE",
    "wandb/": "a.py",
    "checkpoint-500/": "modeling.py",
    ".cache/": "LICENSE",
    ".git/": "a.py",
    ".eval_results/": "a.py",
    "__pycache__/": "a.py",
}


@pytest.fixture
def folder(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


def listed(folder):
    return list_sidecars(open_checkpoint(folder, "aligned"))


def put(folder, name, content=b"x"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if name != "config.json" else b"{}")
    return path


@pytest.mark.parametrize("name", CARRIED)
def test_files_that_belong_to_a_model_are_carried(folder, name):
    put(folder, name)
    assert listed(folder).carried == (name,)
    assert listed(folder).left == ()


@pytest.mark.parametrize("name", LEFT)
def test_other_files_are_left_behind_with_a_reason(folder, name):
    put(folder, name)
    assert listed(folder).carried == ()
    assert [left for left, _ in listed(folder).left] == [name]
    assert all(reason for _, reason in listed(folder).left)


@pytest.mark.parametrize("name", LEFT_WHOLE)
def test_folders_that_are_never_carried_are_left_whole(folder, name):
    put(folder, name + LEFT_WHOLE[name])
    put(folder, name + "deep/er/a.py")
    assert listed(folder).carried == ()
    assert [left for left, _ in listed(folder).left] == [name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "unedited weights"),
        ("pytorch_model.bin.index.json", "index of weights"),
        ("adapter_config.json", "load the adapter"),
        ("README.md", "written anew"),
        ("training_args.bin", "training run"),
        (".env", "secrets"),
        ("model.sig", "signature"),
        ("surgery.json", "ancestor"),
        ("notes.txt", "not a kind that is carried"),
        ("adapter_model.safetensors", "not part of the checkpoint"),
    ],
)
def test_the_reason_says_why(folder, name, reason):
    put(folder, name)
    assert reason in dict(listed(folder).left)[name]


def test_everything_at_once_is_accounted_for_and_sorted(folder):
    for name in [*CARRIED, *LEFT]:
        put(folder, name)
    found = listed(folder)
    assert list(found.carried) == sorted({*found.carried})
    assert list(found.left) == sorted(found.left)
    everything = {*found.carried, *(name for name, _ in found.left)}
    assert everything == {*CARRIED, *LEFT}


def test_the_shards_and_their_index_are_no_sidecars(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert listed(tmp_path).left == (("model.safetensors", "weights that are not part of the checkpoint"),)


def test_pickled_shards_and_their_index_are_no_sidecars(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    put(tmp_path, "other.bin")
    found = list_sidecars(open_checkpoint(tmp_path, "aligned", allow_pickle=True))
    assert [name for name, _ in found.left] == ["other.bin"]


def test_links_to_files_are_carried_as_in_a_hub_cache(folder):
    put(folder, "../blobs/1")
    (folder / "tokenizer.json").symlink_to("../blobs/1")
    assert listed(folder).carried == ("tokenizer.json",)


def test_links_to_folders_are_not_entered(folder):
    put(folder, "code/a.py")
    (folder / "code" / "up").symlink_to(folder)
    (folder / "root").symlink_to("/")
    found = listed(folder)
    assert found.carried == ("code/a.py",)
    assert dict(found.left) == {"code/up/": "a link to a folder", "root/": "a link to a folder"}


def test_a_link_to_itself_is_left_unless_it_is_to_be_carried(folder):
    (folder / "loop").symlink_to("loop")
    assert [name for name, _ in listed(folder).left] == ["loop"]
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(InputError, match=r"aligned/tokenizer\.json"):
        listed(folder)


def test_a_link_to_nothing_that_is_to_be_carried_is_refused(folder):
    (folder / "notes").symlink_to("gone")
    listed(folder)
    (folder / "LICENSE").symlink_to("gone")
    with pytest.raises(InputError, match="aligned/LICENSE is missing"):
        listed(folder)


def test_a_pipe_is_left_behind(folder):
    os.mkfifo(folder / "LICENSE")
    assert listed(folder).left == (("LICENSE", "not a regular file"),)


LEVELS = 1100  # more than Python calls can be nested


def test_a_deep_tree_is_walked(folder):
    deep = "/".join(["d"] * LEVELS)
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(LEVELS):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("a.py", os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    assert listed(folder).carried == (f"{deep}/a.py",)
    (folder / deep / "a.py").unlink()
    for depth in range(LEVELS, 0, -1):
        os.rmdir("/".join([str(folder), *["d"] * depth]))


def test_names_that_are_no_text_are_left_and_written_as_escapes(folder):
    for name in (b"LICENSE\xff", b"a\n.py"):
        with open(os.fsencode(folder) + b"/" + name, "wb"):
            pass
    found = listed(folder)
    assert found.carried == ()
    assert [name for name, _ in found.left] == ["LICENSE\\udcff", "a\\n.py"]


def test_a_file_that_may_not_be_read_is_an_access_error(folder, monkeypatch):
    put(folder, "notes.txt")
    monkeypatch.setattr("surgery.checkpoint.sidecars.os.access", lambda *_: False)
    listed(folder)
    put(folder, "tokenizer.json")
    with pytest.raises(AccessError, match=r"aligned/tokenizer\.json"):
        listed(folder)
