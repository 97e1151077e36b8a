"""`--stream`: the command against a Hub on loopback, with disk for the output and two shards."""

import hashlib
import json
import re

import pytest
import torch

from surgery.testing import perturbed_copy, write_checkpoint


@pytest.fixture
def pair(surgery_on_hub, tmp_path):
    """`org/base` in two shards and `org/aligned` in five."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (137, 123) for i in range(9)} | {
        "model.embed_tokens.weight": (141, 123),
        "model.norm.weight": (123,),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    five = write_checkpoint(tmp_path / "made" / "five", tensors, config, shards=5)
    base = write_checkpoint(tmp_path / "made" / "b", tensors, config, shards=2)
    aligned = perturbed_copy(five, tmp_path / "made" / "a")
    for name, folder in (("org/base", base), ("org/aligned", aligned)):
        surgery_on_hub.hub.create(name).commit_folder(folder)
    return base, aligned


def output(folder):
    """SHA-256 of every file but the account of the run."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "surgery.run.json"
    }


def cached_weights(place):
    return [path for path in (place / "home").rglob("*.safetensors")]


def test_a_streamed_edit_is_the_downloaded_one_byte_for_byte(surgery_on_hub, pair, tmp_path):
    surgery = surgery_on_hub
    done = surgery("lox", "org/base", "org/aligned", "--stream", "-o", "streamed")
    assert done.returncode == 0, done.stderr
    assert cached_weights(tmp_path) == []
    assert not [path for path in (tmp_path / "streamed").iterdir() if path.name.startswith(".")]
    sent = surgery.hub.sent("/org/aligned/[0-9a-f]{64}$")
    weights = sum(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    assert weights < sent < 1.1 * weights
    done = surgery("lox", "org/base", "org/aligned", "-o", "downloaded")
    assert done.returncode == 0, done.stderr
    assert len(cached_weights(tmp_path)) == 7, "the control"
    assert output(tmp_path / "streamed") == output(tmp_path / "downloaded")
    verified = surgery("verify", "streamed", "--recompute", "--strict")
    assert verified.returncode == 0, verified.stderr
    assert "identical" in verified.stdout


def test_a_plan_of_a_stream_downloads_headers_only(surgery_on_hub, pair, tmp_path):
    for extra in ((), ("--stream",)):
        done = surgery_on_hub("lox", "org/base", "org/aligned", "--plan", "--json", *extra)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["tensors"]) == 11
    assert surgery_on_hub.hub.sent(r"/[0-9a-f]{64}$") < 20_000
    assert cached_weights(tmp_path) == []


@pytest.mark.slow
def test_a_stream_that_broke_off_goes_on(surgery_on_hub, pair, tmp_path):
    surgery = surgery_on_hub
    commit = surgery.hub.repositories["org/aligned"].refs["main"]
    tree = surgery.hub.repositories["org/aligned"].trees[commit]
    shas = [tree[f"model-{number:05d}-of-00005.safetensors"].sha256 for number in range(1, 6)]
    # Header requests are of the same file: the length, the header, then the file itself.
    surgery.hub.faults.append(type(surgery).fault(f"/{shas[3]}$", keep=9000))
    done = surgery("lox", "org/base", "org/aligned", "--stream", "-o", "out")
    assert done.returncode == 5, done.stderr
    assert "broke off" in done.stderr
    assert (tmp_path / "out.partial").is_dir()
    surgery.hub.faults.clear()
    begin = len(surgery.hub.seen)
    done = surgery("lox", "org/base", "org/aligned", "--stream", "-o", "out")
    assert done.returncode == 0, done.stderr
    asked = [seen.headers.get("range") for seen in surgery.hub.seen[begin:] if shas[3] in seen.path]
    assert re.fullmatch(r"bytes=[1-9]\d*-\d+", asked[-1]), asked
    again = sum(seen.sent for seen in surgery.hub.seen[begin:] if shas[0] in seen.path)
    assert again < 2000, "what was done is not downloaded again"
    assert surgery("lox", "org/base", "org/aligned", "-o", "whole").returncode == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
