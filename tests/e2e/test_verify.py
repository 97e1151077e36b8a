"""Verification tells identical from equivalent from different."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.reader import file_sha256
from surgery.errors import CheckError, InputError
from surgery.methods.vaccine import Vaccine
from surgery.testing import tiny_pair
from surgery.train.running import immunise
from surgery.train.training import Training

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def output(tmp_path):
    base, aligned = tiny_pair(tmp_path)
    surgery.apply(surgery.LoX(rank=6, alpha=1.5), base=base, model=aligned, output=tmp_path / "out")
    return tmp_path / "out"


def rewrite(output, change):
    """Change the stored weights and bring the manifest's hash in line, as another machine's run would have it."""
    file = output / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((output / "surgery.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    (output / "surgery.json").write_text(json.dumps(manifest))


def nudge(tensors, *, steps, entry=5):
    """Move an entry by whole units in the last place."""
    tensors[NAME].view(torch.int16).view(-1)[entry] += steps


def test_a_repeated_edit_is_identical(output):
    found = surgery.verify(output, recompute=True, strict=True)
    assert (found.recomputed, found.notes) == ("identical", ())
    assert found.copied == 5


@pytest.mark.parametrize("steps", [1, -1])
def test_one_unit_in_the_last_place_is_equivalent_and_strict_refuses_it(output, steps):
    rewrite(output, lambda tensors: nudge(tensors, steps=steps))
    found = surgery.verify(output, recompute=True)
    assert found.recomputed == "equivalent"
    assert NAME in found.notes[0]
    with pytest.raises(CheckError, match=r"up_proj.*--strict"):
        surgery.verify(output, recompute=True, strict=True)


def test_two_units_in_the_last_place_are_different(output):
    rewrite(output, lambda tensors: nudge(tensors, steps=2))
    with pytest.raises(CheckError, match=r"up_proj\.weight differs from the repeated edit"):
        surgery.verify(output, recompute=True)


def test_an_edit_of_another_strength_is_different_even_within_one_unit(output, tmp_path):
    """Rounded to nearest, much of the edit is lost: every entry is within one unit, yet the edit is another."""
    other = surgery.Options(rounding="nearest")
    method = surgery.LoX(rank=6, alpha=1.5)
    surgery.apply(
        method, base=tmp_path / "base", model=tmp_path / "aligned", output=tmp_path / "n", options=other
    )
    lossy = load_file(tmp_path / "n/model.safetensors")
    rewrite(output, lambda tensors: tensors.update(lossy))
    with pytest.raises(CheckError, match="of the edit where its certificate allows"):
        surgery.verify(output, recompute=True)


def test_a_copied_tensor_that_was_touched_is_found(output):
    rewrite(output, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(CheckError, match=r"model\.norm\.weight should be a copy"):
        surgery.verify(output)


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "surgery.tensors.jsonl"])
def test_a_file_that_was_changed_is_named(output, what):
    with open(output / what, "ab") as file:
        file.write(b" ")
    with pytest.raises(CheckError, match=what):
        surgery.verify(output)


def test_weights_added_after_the_run_are_found(output):
    (output / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(CheckError, match=r"extra\.safetensors"):
        surgery.verify(output)


def test_the_card_may_be_changed(output):
    (output / "README.md").write_text("mine")
    surgery.verify(output)


def test_without_its_sources_only_the_files_are_checked(output, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    found = surgery.verify(output)
    assert found.copied is None
    assert "not compared" in found.notes[0]
    with pytest.raises(InputError):
        surgery.verify(output, recompute=True)


def test_other_sources_in_the_same_place_are_told(output, tmp_path):
    file = tmp_path / "base/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors of the base checkpoint is not the file"):
        surgery.verify(output, recompute=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 99}'])
def test_a_manifest_that_cannot_be_read_is_an_input_error(output, content):
    (output / "surgery.json").write_text(content)
    with pytest.raises(InputError, match=r"surgery\.json"):
        surgery.verify(output)


@pytest.mark.parametrize("full", [False, True])
def test_a_trained_model_is_checked_by_the_adapter_kept_beside_it(tmp_path, full):
    training = Training(steps=1, batch_size=2, keep_adapter=True, full=full)
    immunise(Vaccine(), model="demo:aligned", output=tmp_path / "out", training=training)
    found = surgery.verify(tmp_path / "out", recompute=True, strict=True)
    assert (found.recomputed, found.notes) == ("identical", ())
    (tmp_path / "out-adapter").rename(tmp_path / "elsewhere")
    left = surgery.verify(tmp_path / "out")
    assert left.copied == found.copied
    assert left.notes == (
        "the edit cannot be repeated: the adapter that its training came to was not kept; the same command with "
        "--keep-adapter keeps it",
    )
    with pytest.raises(InputError, match="was not kept"):
        surgery.verify(tmp_path / "out", recompute=True)
