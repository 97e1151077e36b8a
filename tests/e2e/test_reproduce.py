"""`surgery reproduce`: identical, equivalent and different, from a folder and from the Hub."""

import json
import shutil
from pathlib import Path

import adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.reader import file_sha256
from surgery.errors import CheckError, InputError, UsageError
from surgery.reproduction import reproduce
from surgery.testing import perturbed_copy, tiny_pair, write_checkpoint

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"
COPIED = "model.norm.weight"


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A pair and what was made of it: an edit, an adapter, a merge."""
    place = tmp_path_factory.mktemp("master")
    base, aligned = tiny_pair(place)
    pair = {"base": base, "model": aligned}
    surgery.apply(surgery.LoX(rank=6, alpha=1.5), **pair, output=place / "edit")
    surgery.apply(surgery.LoX(rank=2), **pair, output=place / "lora", options=surgery.Options(as_lora=True))
    surgery.merge(aligned, adapters.make(aligned, place / "made"), output=place / "merge")
    return place


@pytest.fixture
def place(master, tmp_path):
    """The same, the test's own: what says where the sources lay is brought in line."""
    shutil.copytree(master, tmp_path / "p")
    for output in ("edit", "lora", "merge"):
        file = tmp_path / "p" / output / "surgery.run.json"
        file.write_text(file.read_text().replace(str(master), str(tmp_path / "p")))
    return tmp_path / "p"


def record(output, *names):
    """Bring the manifest's hashes in line with the files, as another machine's run would have them."""
    manifest = json.loads((output / "surgery.json").read_text())
    for name in names:
        size = (output / name).stat().st_size
        manifest["files"][name] = {"size": size, "sha256": file_sha256(output / name)}
    (output / "surgery.json").write_text(json.dumps(manifest))


def rewrite(output, change, file=WEIGHTS):
    """Change stored tensors, the manifest with them."""
    tensors = load_file(output / file)
    change(tensors)
    save_file(tensors, output / file, metadata={"format": "pt"})
    record(output, file)


def nudge(tensors, name, steps):
    """Move an entry by whole units in the last place."""
    tensors[name].view(torch.int16).view(-1)[5] += steps


def change_manifest(output, change):
    manifest = json.loads((output / "surgery.json").read_text())
    change(manifest)
    (output / "surgery.json").write_text(json.dumps(manifest))


# Identical, equivalent, different


@pytest.mark.parametrize("kind", ["edit", "lora", "merge"])
def test_what_was_made_here_is_identical(place, kind):
    found = reproduce(place / kind)
    assert (found.verdict, found.changed, found.tensors, found.environment) == ("identical", (), {}, {})
    assert found.files == len(json.loads((place / kind / "surgery.json").read_text())["files"])
    found.require(strict=True)


def test_one_unit_in_the_last_place_is_equivalent_and_strict_refuses_it(place):
    rewrite(place / "edit", lambda tensors: nudge(tensors, NAME, 1))
    found = reproduce(place / "edit")
    assert (found.verdict, found.changed, found.tensors) == ("equivalent", (WEIGHTS,), {NAME: "equivalent"})
    found.require(strict=False)
    with pytest.raises(CheckError, match=r"not identical.*--strict"):
        found.require(strict=True)


def test_every_tensor_that_is_different_is_named(place):
    def change(tensors):
        nudge(tensors, NAME, 2)
        nudge(tensors, COPIED, 1)

    rewrite(place / "edit", change)
    found = reproduce(place / "edit")
    assert found.verdict == "different"
    assert set(found.tensors) == {NAME, COPIED}
    assert "should be a copy" in found.tensors[COPIED]
    with pytest.raises(CheckError, match=r"differs from the repeated edit.*2 tensors differ"):
        found.require(strict=False)


@pytest.mark.parametrize(
    ("kind", "option", "value"), [("edit", "rank", 5), ("edit", "alpha", 1.25), ("merge", "weights", [0.5])]
)
def test_options_that_are_not_those_of_the_run_are_different(place, kind, option, value):
    change_manifest(place / kind, lambda manifest: manifest["options"].update({option: value}))
    found = reproduce(place / kind)
    assert found.verdict == "different"
    assert any(NAME.rpartition(".layers")[0] in name for name in found.tensors)


def test_a_side_file_that_is_not_the_models_is_different(place):
    (place / "edit/config.json").write_text((place / "edit/config.json").read_text() + " ")
    record(place / "edit", "config.json")
    found = reproduce(place / "edit")
    assert (found.verdict, found.changed, found.tensors) == ("different", ("config.json",), {})
    with pytest.raises(CheckError, match=r"config\.json is another file"):
        found.require(strict=False)


def test_figures_that_differ_are_equivalent_and_actions_that_differ_are_not(place):
    figures = place / "edit/surgery.tensors.jsonl"
    lines = [json.loads(line) for line in figures.read_text().splitlines()]
    edited = next(line for line in lines if line["action"] == "edit")
    edited["noise"] *= 1 + 1e-12
    for verdict in ("equivalent", "different"):
        figures.write_text("".join(json.dumps(line) + "\n" for line in lines))
        record(place / "edit", figures.name)
        found = reproduce(place / "edit")
        assert found.verdict == verdict
        assert edited["name"] in found.notes[0]
        edited["action"] = "copy"


def test_a_damaged_file_is_no_longer_what_was_published(place):
    with open(place / "edit" / WEIGHTS, "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x55")
    with pytest.raises(CheckError, match="is not the file the manifest describes"):
        reproduce(place / "edit")


def test_factors_may_change_sign_together_and_not_alone(place):
    """Which sign a singular vector gets is the hardware's choice; the product is the edit."""
    file = "adapter_model.safetensors"
    first = next(name for name in load_file(place / "lora" / file) if "lora_A" in name)
    pair = (first, first.replace("lora_A", "lora_B"))
    rewrite(place / "lora", lambda tensors: [tensors[name].neg_() for name in pair], file)
    found = reproduce(place / "lora")
    assert (found.verdict, set(found.tensors.values())) == ("equivalent", {"equivalent"})
    rewrite(place / "lora", lambda tensors: tensors[first].neg_(), file)
    found = reproduce(place / "lora")
    assert found.verdict == "different"
    # Both were negated before, so that the first is as it was, and the second alone is not.
    assert set(found.tensors) == {pair[1]}


# What differs around it


def test_versions_threads_and_processor_are_named_where_they_differ(place):
    def older(manifest):
        manifest["versions"]["torch"] = "2.6.0"
        manifest["threads"] = 7

    change_manifest(place / "edit", older)
    account = place / "edit/surgery.run.json"
    said = json.loads(account.read_text())
    here = torch.backends.cpu.get_cpu_capability()
    assert said["cpu_capability"] == here
    account.write_text(json.dumps({**said, "cpu_capability": "Z80"}))
    found = reproduce(place / "edit")
    assert found.verdict == "identical"
    assert found.environment == {
        "torch": {"recorded": "2.6.0", "here": torch.__version__},
        "threads": {"recorded": 7, "here": 1},
        "cpu_capability": {"recorded": "Z80", "here": here},
    }


def test_a_manifest_alone_is_enough(place, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("surgery.json", "surgery.tensors.jsonl"):
        shutil.copy(place / "edit" / name, alone)
    inputs = {role: place / role for role in ("base", "aligned")}
    assert reproduce(alone, inputs=inputs, output=tmp_path / "kept").verdict == "identical"
    assert file_sha256(tmp_path / "kept" / WEIGHTS) == file_sha256(place / "edit" / WEIGHTS)
    change_manifest(alone, lambda manifest: manifest["options"].update(alpha=1.25))
    found = reproduce(alone, inputs=inputs)
    assert found.verdict == "different"
    assert "only beside the published weights" in found.tensors[WEIGHTS]


# Inputs


def test_an_input_that_is_gone_can_be_named_and_must_be_the_same(place, tmp_path):
    (place / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"there is no folder .*--input ROLE=SOURCE"):
        reproduce(place / "edit")
    assert reproduce(place / "edit", inputs={"base": tmp_path / "moved"}).verdict == "identical"
    other = perturbed_copy(tmp_path / "moved", tmp_path / "other")
    with pytest.raises(InputError, match="of the base checkpoint is not the file the manifest names"):
        reproduce(place / "edit", inputs={"base": other})
    with pytest.raises(UsageError, match="has no input 'bsae'"):
        reproduce(place / "edit", inputs={"bsae": other})


@pytest.mark.parametrize(("key", "value"), [("rank", None), ("sharpness", 1)])
def test_a_manifest_that_describes_no_run_is_an_input_error(place, key, value):
    def change(manifest):
        manifest["options"][key] = value
        if value is None:
            del manifest["options"]["rounding"]

    change_manifest(place / "edit", change)
    with pytest.raises(InputError, match="describes no run"):
        reproduce(place / "edit")


def test_of_a_trained_model_the_merge_is_repeated_where_the_adapter_is(tmp_path, monkeypatch):
    from surgery.methods.vaccine import Vaccine
    from surgery.train.running import immunise
    from surgery.train.training import Training

    monkeypatch.chdir(tmp_path)
    training = Training(steps=2, batch_size=4, keep_adapter=True)
    immunise(Vaccine(), model="demo:aligned", output="out", training=training)
    assert reproduce("out").verdict == "identical"
    Path("out").rename("moved")
    assert reproduce("moved", inputs={"adapter": "out-adapter"}).verdict == "identical"
    Path("moved").rename("out")
    Path("out-adapter").rename("elsewhere")
    with pytest.raises(
        InputError,
        match=r"not lie beside it; --input adapter=.*training is not repeated.*surgery vaccine demo:al",
    ):
        reproduce("out")
    assert reproduce("out", inputs={"adapter": "elsewhere"}).verdict == "identical"
    with pytest.raises(InputError, match="is an adapter that was trained; training is not repeated"):
        reproduce("elsewhere")


# The Hub


@pytest.fixture
def on_hub(surgery_on_hub, tmp_path):
    """`org/base`, `org/aligned` and `org/edited`, which was made from the two."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(37, 23, generator=generator).bfloat16()
        for layer in range(3)
    }
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    base = write_checkpoint(tmp_path / "made/b", tensors, config, shards=2)
    aligned = perturbed_copy(base, tmp_path / "made/a")
    for name, folder in (("org/base", base), ("org/aligned", aligned)):
        surgery_on_hub.hub.create(name).commit_folder(folder)
    done = surgery_on_hub("lox", "org/base", "org/aligned", "--rank", 3, "-o", "out", "-q")
    assert done.returncode == 0, done.stderr
    (tmp_path / "out/surgery.run.json").unlink()
    surgery_on_hub.hub.create("org/edited").commit_folder(tmp_path / "out")
    return surgery_on_hub


def test_an_output_on_the_hub_is_reproduced_without_its_weights(on_hub):
    # The inputs are pinned: what their branches mean now does not matter.
    on_hub.hub.repositories["org/aligned"].commit({"model.safetensors": b"later"})
    done = on_hub("reproduce", "org/edited", "--strict", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "identical"
    assert found["output"] == "org/edited@" + on_hub.hub.repositories["org/edited"].refs["main"]
    assert on_hub.hub.fetched("org/edited") == {"surgery.json", "surgery.tensors.jsonl"}
    assert not list(on_hub.place.glob("surgery-*"))


def test_weights_on_the_hub_that_are_not_the_manifests_are_found_from_the_listing(on_hub):
    repository = on_hub.hub.repositories["org/edited"]
    name = next(name for name in repository.trees[repository.refs["main"]] if name.endswith(".safetensors"))
    repository.commit({name: b"another model"})
    done = on_hub("reproduce", "org/edited")
    assert done.returncode == 1
    assert "is not the file its manifest describes" in done.stderr
    assert name not in on_hub.hub.fetched("org/edited")


def test_another_edit_on_the_hub_exits_1_and_a_gone_input_5(on_hub):
    repository = on_hub.hub.repositories["org/edited"]
    manifest = json.loads(repository.trees[repository.refs["main"]]["surgery.json"].content)
    manifest["options"]["alpha"] = 1.5
    repository.commit({"surgery.json": json.dumps(manifest).encode()})
    done = on_hub("reproduce", "org/edited")
    assert done.returncode == 1
    assert "hf download org/edited --revision" in done.stderr
    assert "verdict" in done.stdout
    del on_hub.hub.repositories["org/base"]
    shutil.rmtree(on_hub.place / "home")
    assert on_hub("reproduce", "org/edited").returncode == 5


def test_a_repository_without_a_manifest_is_an_input_error(on_hub):
    done = on_hub("reproduce", "org/base")
    assert done.returncode == 3
    assert "has no surgery.json" in done.stderr
