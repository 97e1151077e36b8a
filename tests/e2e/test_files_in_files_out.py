"""What lies in the aligned checkpoint's folder comes out as it should, and nothing else does."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import surgery
from surgery import pipeline, testing
from surgery.checkpoint.header import read_header
from surgery.methods.lox import LoX
from surgery.options import Options

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG = {"model_type": "surprise", "torch_dtype": "bfloat16", "note": "größer"}
OWN = {"README.md", "surgery.json", "surgery.run.json", "surgery.tensors.jsonl"}


def weights(layers=2, rows=23, columns=19, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(5)
    shapes = {"embed_tokens.weight": (31, columns), "norm.weight": (columns,)}
    shapes |= {f"layers.{layer}.up_proj.weight": (rows, columns) for layer in range(layers)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**found, "rotary.position_ids": torch.arange(7)}


@pytest.fixture(params=[1, 3], ids=["single", "sharded"])
def shards(request):
    return request.param


@pytest.fixture
def pair(tmp_path, shards):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG, shards=shards)
    return base, testing.perturbed_copy(base, tmp_path / "aligned")


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lox(pair, out, *, rank=4, alpha=1.5, **options):
    base, aligned = pair
    surgery.apply(
        LoX(rank=rank, alpha=alpha), base=base, model=aligned, output=out, options=Options(**options)
    )
    return out


def left_behind(pair, out):
    """What the plan says stays behind: reason by name."""
    base, aligned = pair
    job = pipeline.prepare(LoX(rank=4), base=base, model=aligned, output=out)
    return {row["file"]: row["reason"] for row in job.plan.document()["left_behind"]}


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weight_files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


# Weights.


def test_shard_names_and_what_they_hold_are_kept(pair, tmp_path, shards):
    out = lox(pair, tmp_path / "out")
    assert len(weight_files(out)) == shards
    for file in pair[1].glob("*.safetensors"):
        source, result = read_header(file, "source"), read_header(out / file.name, "result")
        assert result.metadata == {"format": "pt"}
        described = [
            [(info.name, info.dtype, info.shape, info.start) for info in header.tensors]
            for header in (source, result)
        ]
        assert described[0] == described[1]
        with safe_open(out / file.name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_an_index_tells_the_bytes_of_all_tensors_and_where_they_are(pair, tmp_path, shards):
    if shards > 1:
        index = json.loads((pair[1] / INDEX).read_text())
        index["metadata"] |= {"total_size": 1, "total_parameters": 77}
        (pair[1] / INDEX).write_text(json.dumps(index))
    out = lox(pair, tmp_path / "out")
    assert (out / INDEX).exists() is (shards > 1)
    if shards == 1:
        return
    found = json.loads((out / INDEX).read_text())
    tensors = testing.read_tensors(out)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert found["metadata"] == {"total_size": size, "total_parameters": 77}
    assert found["weight_map"] == index["weight_map"]
    assert found["weight_map"].keys() == tensors.keys()


def test_where_index_and_single_file_lie_together_the_index_wins_and_the_plan_says_so(tmp_path):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG, shards=2)
    aligned = testing.perturbed_copy(base, tmp_path / "aligned")
    expected = weight_files(lox((base, aligned), tmp_path / "expected"))
    save_file({"other": torch.ones(3)}, aligned / SINGLE)
    plan = pipeline.prepare(LoX(rank=4), base=base, model=aligned, output=tmp_path / "out").plan
    assert any(f"an index and {SINGLE}" in note for note in plan.notes)
    out = lox((base, aligned), tmp_path / "out")
    assert weight_files(out) == expected
    assert not (out / SINGLE).exists()


def test_a_file_without_metadata_gets_that_of_torch(tmp_path):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG)
    aligned = testing.perturbed_copy(base, tmp_path / "aligned")
    save_file(testing.read_tensors(aligned), aligned / SINGLE)
    out = lox((base, aligned), tmp_path / "out", alpha=0.0)
    assert read_header(out / SINGLE, "out").metadata == {"format": "pt"}
    source, result = testing.read_tensors(aligned), testing.read_tensors(out)
    assert source.keys() == result.keys()
    assert all(torch.equal(source[name], result[name]) for name in source)


def test_alpha_0_writes_the_weight_files_of_the_aligned_model_byte_for_byte(pair, tmp_path):
    assert weight_files(lox(pair, tmp_path / "out", alpha=0.0)) == weight_files(pair[1])
    assert weight_files(lox(pair, tmp_path / "control", alpha=1.5)) != weight_files(pair[1])


def test_shards_in_folders_below_keep_their_place(tmp_path):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG, shards=2)
    aligned = testing.perturbed_copy(base, tmp_path / "aligned")
    moved = "parts/model-00002-of-00002.safetensors"
    (aligned / "parts").mkdir()
    (aligned / Path(moved).name).rename(aligned / moved)
    index = json.loads((aligned / INDEX).read_text())
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = moved if file == Path(moved).name else file
    (aligned / INDEX).write_text(json.dumps(index))
    out = lox((base, aligned), tmp_path / "out")
    assert (out / moved).is_file()
    assert json.loads((out / INDEX).read_text())["weight_map"] == index["weight_map"]


# Side files.

CARRIED = {
    "tokenizer.json": b'{"version":"1.0"}',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }\r\n",
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "generation_config.json": b'{"eos_token_id": 1}',
    "preprocessor_config.json": b"{}",
    "modeling_surprise.py": b"raise SystemExit('run')\n",
    "code/layers.py": b"raise SystemExit('run')\n",
    "LICENSE": b"mine\n",
    "LICENSE.txt": b"mine too\n",
    "NOTICE": b"\xff\xfe not text",
    "USE_POLICY.md": b"be good",
}
LEFT = {
    "pytorch_model.bin": "another weight format",
    "model.gguf": "another weight format",
    "tf_model.h5": "another weight format",
    "flax_model.msgpack": "another weight format",
    "model.onnx": "another weight format",
    "onnx/model.onnx": "another weight format",
    "original/consolidated.00.pth": "another weight format",
    "consolidated.safetensors": "",
    "adapter_model.safetensors": "not part of the checkpoint",
    "adapter_model.bin": "another weight format",
    "adapter_config.json": "an adapter's settings",
    "model.fp16.safetensors": "not part of the checkpoint",
    "pytorch_model.bin.index.json": "the index of weights",
    "training_args.bin": "training run",
    "trainer_state.json": "training run",
    "optimizer.pt": "training run",
    "optimizer.bin": "training run",
    "scheduler.pt": "training run",
    "rng_state.pth": "training run",
    "checkpoint-500/model.safetensors": "training run",
    "runs/Jan01/events.out.tfevents.1": "training run",
    ".cache/huggingface/x.metadata": "hidden",
    ".env": "hidden",
    ".gitattributes": "hidden",
    ".eval_results/mmlu.yaml": "hidden",
    "model.sig": "signature",
    "model.sigstore": "signature",
    "surgery.json": "linked as an ancestor",
    "surgery.run.json": "linked as an ancestor",
    "surgery.tensors.jsonl": "linked as an ancestor",
    "README.md": "written anew",
    "__pycache__/modeling_surprise.pyc": "",
    "notes.xyz": "not a kind",
}


def planned(name, reasons):
    """The reason given for a file, or for the folder it is in."""
    return reasons.get(name, reasons.get(name.partition("/")[0] + "/"))


def test_side_files_travel_byte_for_byte(pair, tmp_path):
    put(pair[1], CARRIED)
    put(pair[0], {"chat_template.jinja": b"that of base", "tokenizer_of_base.model": b"base"})
    out = lox(pair, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in CARRIED} == CARRIED
    assert (out / "config.json").read_bytes() == (pair[1] / "config.json").read_bytes()
    index = {INDEX} if (pair[1] / INDEX).exists() else set()
    assert names(out) == {*CARRIED, "config.json", *OWN, *weight_files(out), *index}
    files = json.loads((out / "surgery.json").read_text())["files"]
    assert {name: files[name]["sha256"] for name in CARRIED} == {name: sha256(out / name) for name in CARRIED}


def test_what_must_not_travel_stays_and_the_plan_says_why(pair, tmp_path):
    put(pair[1], {name: b"{}" if name.endswith("json") else b"secret" for name in LEFT})
    reasons = left_behind(pair, tmp_path / "out")
    told = {name: planned(name, reasons) for name in LEFT}
    assert not [name for name, reason in told.items() if reason is None]
    assert {name: reason for name, reason in told.items() if LEFT[name] not in reason} == {}
    out = lox(pair, tmp_path / "out")
    assert names(out) & (LEFT.keys() - OWN) == set()
    index = {INDEX} if (pair[1] / INDEX).exists() else set()
    assert names(out) == {"config.json", *OWN, *weight_files(pair[1]), *index} - LEFT.keys() | OWN
    assert not any(b"secret" in (out / name).read_bytes() for name in names(out))


def test_what_is_left_behind_is_said_by_the_command(pair, tmp_path, capfd):
    from surgery.cli import output

    put(pair[1], {"pytorch_model.bin": b"x", "runs/a/b": b"x", ".env": b"x"})
    output.plan(pipeline.prepare(LoX(rank=4), base=pair[0], model=pair[1], output=tmp_path / "out"))
    text = capfd.readouterr().out
    assert "left behind" in text
    for name in ("pytorch_model.bin (", "runs/ (", ".env ("):
        assert name in text
    assert not (tmp_path / "out").exists()


def test_the_manifest_of_the_parent_is_linked_and_not_carried(pair, tmp_path):
    base, _ = pair
    parent = lox(pair, tmp_path / "parent", rank=2)
    out = lox((base, parent), tmp_path / "out")
    inputs = json.loads((out / "surgery.json").read_text())["inputs"]
    assert inputs["aligned"]["ancestor"] == sha256(parent / "surgery.json")
    assert "ancestor" not in inputs["base"]
    assert sha256(out / "surgery.json") != sha256(parent / "surgery.json")
    left = left_behind((base, parent), tmp_path / "x")
    assert {"surgery.json", "surgery.run.json", "surgery.tensors.jsonl", "README.md"} <= left.keys()


# --dtype.


@pytest.mark.parametrize(
    "text",
    [
        '{"torch_dtype": "bfloat16", "x": 1.10}',
        '{\r\n\t"a": "\\u00e9 \u00e9",\r\n\t"dtype" : "bfloat16",\r\n\t"b": 1e-05\r\n}\r\n',
        '{"text_config": {"hidden_size": 7}, "dtype": "float16", "my_dtype": "int4"}',
    ],
)
def test_dtype_casts_every_float_and_rewrites_only_the_dtype_in_the_config(pair, tmp_path, text):
    data = text.encode()
    (pair[1] / "config.json").write_bytes(data)
    put(pair[1], {"generation_config.json": b'{"dtype": "bfloat16"}'})
    out = lox(pair, tmp_path / "out", dtype="float32")
    old = "float16" if b'"float16"' in data else "bfloat16"
    assert (out / "config.json").read_bytes() == data.replace(f'"{old}"'.encode(), b'"float32"')
    assert (out / "generation_config.json").read_bytes() == b'{"dtype": "bfloat16"}'
    found, source = testing.read_tensors(out), testing.read_tensors(pair[1])
    assert {str(found[name].dtype) for name in source if source[name].is_floating_point()} == {
        "torch.float32"
    }
    assert torch.equal(found["norm.weight"], source["norm.weight"].float())
    assert torch.equal(found["rotary.position_ids"], source["rotary.position_ids"])
    manifest = json.loads((out / "surgery.json").read_text())
    assert manifest["options"]["dtype"] == "float32"
    assert any("--dtype" in note for note in manifest["notes"])


# Modes and links.


def hub_cache(folder, cache):
    """Turn a folder into a snapshot of a Hub cache: links into a folder of blobs."""
    repository = cache / f"models--org--{folder.name}"
    commit = hashlib.sha1(folder.name.encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in sorted(names(folder)):
        blob = repository / "blobs" / sha256(folder / name)
        blob.write_bytes((folder / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_links_of_a_hub_cache_are_followed_and_come_out_as_files(pair, tmp_path):
    put(pair[1], CARRIED)
    snapshots = [hub_cache(folder, tmp_path / "hub") for folder in pair]
    assert (snapshots[1] / "tokenizer.json").is_symlink()
    out = lox(snapshots, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert weight_files(out) == weight_files(lox(pair, tmp_path / "expected"))
    assert {name: (out / name).read_bytes() for name in CARRIED} == CARRIED


def process(arguments, **more):
    command = [sys.executable, "-m", "surgery", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **more)


@pytest.mark.slow
def test_repositories_in_the_hub_cache_are_edited_offline_and_pinned(tmp_path):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG, shards=2)
    aligned = testing.perturbed_copy(base, tmp_path / "aligned")
    commits = [hub_cache(folder, tmp_path / "hub").name for folder in (base, aligned)]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = ["lox", "org/base", "hf://org/aligned@main", "--rank", "4", "--alpha", "1.5", "-q"]
    done = process(command, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    out = tmp_path / "aligned-lox-r4-a1.5"
    assert weight_files(out) == weight_files(lox((base, aligned), tmp_path / "expected"))
    inputs = json.loads((out / "surgery.json").read_text())["inputs"]
    assert [inputs[role]["commit"] for role in ("base", "aligned")] == commits
    assert [inputs[role]["repository"] for role in ("base", "aligned")] == ["org/base", "org/aligned"]


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_modes_are_those_the_umask_gives(tmp_path, umask):
    base = testing.write_checkpoint(tmp_path / "base", weights(), CONFIG, shards=2)
    aligned = testing.perturbed_copy(base, tmp_path / "aligned")
    put(aligned, {"additional_chat_templates/tool.jinja": b"x", "LICENSE": b"x"})
    (aligned / "LICENSE").chmod(0o400)
    done = process(["lox", base, aligned, "--rank", "4", "-q", "-o", tmp_path / "out"], umask=umask)
    assert done.returncode == 0, done.stderr
    modes = {
        path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))
    }
    wrong = {
        path: oct(mode)
        for path, mode in modes.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


# Memory.

ROWS, COLUMNS = 1024, 1024
TENSOR = ROWS * COLUMNS * 4
HOLDS_ALL = """
import sys, time
from safetensors.torch import load_file
held = [load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:]]
held = [{name: tensor.clone() for name, tensor in found.items()} for found in held]
time.sleep(0.2)
"""


def anonymous(pid):
    """Anonymous resident bytes of a process, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def peak(command):
    """The largest anonymous memory seen of a process, in bytes."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        largest = 0
        while process.poll() is None:
            largest = max(largest, anonymous(process.pid))
            if time.monotonic() - started > 200:
                process.kill()
            time.sleep(0.002)
        assert process.returncode == 0, process.stderr.read()
    return largest


def plain_pair(root, layers):
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{layer}.up_proj.weight": (ROWS, COLUMNS) for layer in range(layers)}
    for side in ("base", "aligned"):
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        testing.write_checkpoint(root / side, tensors, {"model_type": "surprise"})
    return root / "base", root / "aligned"


@pytest.mark.slow
def test_anonymous_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """24 more layers of 4 MiB: at most one tensor more (bookkeeping), where holding all takes 48 more."""
    edit, hold = {}, {}
    for layers in (8, 32):
        pair = [str(folder) for folder in plain_pair(tmp_path / str(layers), layers)]
        out = tmp_path / str(layers) / "out"
        options = ["--rank", "2", "--tol", "0.5", "-q", "-o", str(out)]
        edit[layers] = peak([sys.executable, "-m", "surgery", "lox", *pair, *options])
        hold[layers] = peak([sys.executable, "-c", HOLDS_ALL, *pair])
        shutil.rmtree(tmp_path / str(layers))
    assert hold[32] - hold[8] > 44 * TENSOR
    assert edit[32] - edit[8] < TENSOR
