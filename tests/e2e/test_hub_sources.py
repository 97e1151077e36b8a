"""`surgery lox ORG/BASE ORG/ALIGNED`: the command and the real client against a Hub on loopback."""

import hashlib
import json
import re

import pytest
import torch
import yaml

from surgery import LoX, apply
from surgery.testing import perturbed_copy, write_checkpoint

TOKEN = "hf_secretsecretsecretsecretsecret12"


@pytest.fixture
def pair(surgery_on_hub, tmp_path):
    """`org/base` and `org/aligned` on the Hub, three shards each, and the folders they were made from."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (37, 23) for i in range(3)} | {
        "model.embed_tokens.weight": (41, 23),
        "model.layers.0.self_attn.q_proj.weight": (23, 23),
        "model.norm.weight": (23,),
    }
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    base = write_checkpoint(tmp_path / "made" / "b", tensors, config, shards=3)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    aligned = perturbed_copy(base, tmp_path / "made" / "a")
    (aligned / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\nbase_model: org/base\n---\n# Aligned\n"
    )
    (aligned / "chat_template.jinja").write_text("{{ messages }}")
    (aligned / "LICENSE").write_text("do as you like")
    beside = {"pytorch_model.bin": b"pickle", "x.gguf": b"quantised", "model.fp16.safetensors": b"half"}
    for name, folder in (("org/base", base), ("org/aligned", aligned)):
        surgery_on_hub.hub.create(name).commit_folder(folder, beside)
    return base, aligned


def commits(run):
    return {name: repository.refs["main"] for name, repository in run.hub.repositories.items()}


def error_line(done, code):
    """The one line in which a command failed."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0]


def everything(folder):
    """Every byte below a folder, names included."""
    parts = [str(path).encode() for path in folder.rglob("*")]
    parts += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(parts)


def test_an_edit_from_the_hub_is_pinned_whole_and_can_be_repeated(surgery_on_hub, pair, tmp_path):
    surgery = surgery_on_hub
    surgery.hub.tokens.add(TOKEN)
    surgery.environment["HF_TOKEN"] = TOKEN
    done = surgery("lox", "org/base", "hf://org/aligned@main", "--rank", 3, "--alpha", 1.5)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "aligned-lox-r3-a1.5"
    pinned = commits(surgery)
    assert f"base org/base@{pinned['org/base']}" in done.stdout
    assert "Fetching" not in done.stderr, "no progress bars where nobody watches"

    manifest = json.loads((out / "surgery.json").read_text())
    for role in ("base", "aligned"):
        entry = manifest["inputs"][role]
        name = f"org/{role}"
        assert (entry["repository"], entry["commit"]) == (name, pinned[name])
        assert entry["source"] == f"{name}@{pinned[name]}"
        tree = surgery.hub.repositories[name].trees[pinned[name]]
        assert len(entry["files"]) == 4
        for file, found in entry["files"].items():
            assert found["sha256"] == hashlib.sha256(tree[file].content).hexdigest()
    assert "org/base as its base_model" in re.sub("@[0-9a-f]{40}", "", manifest["roles"])

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("org/aligned", "mit")
    assert f"surgery lox org/base@{pinned['org/base']} org/aligned@{pinned['org/aligned']} --rank 3" in card

    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json"} <= names
    assert not {"pytorch_model.bin", "x.gguf", "model.fp16.safetensors"} & names
    assert all(path.is_file() and not path.is_symlink() for path in out.iterdir())
    snapshot = next((tmp_path / "home" / "hub" / "models--org--aligned" / "snapshots").iterdir())
    assert (snapshot / "LICENSE").is_symlink(), "the control: the source was one of links"
    assert not surgery.hub.fetched() & {"pytorch_model.bin", "x.gguf", "model.fp16.safetensors"}

    asked = [seen.headers.get("authorization") for seen in surgery.hub.seen if seen.origin == "hub"]
    assert f"Bearer {TOKEN}" in asked, "the control: the token was in use"
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in everything(tmp_path)

    surgery.hub.repositories["org/aligned"].commit({"config.json": b"{}"})
    verified = surgery("verify", out, "--recompute", "--strict")
    assert verified.returncode == 0, verified.stderr
    assert "identical" in verified.stdout
    assert TOKEN not in verified.stdout + verified.stderr

    apply(LoX(rank=3, alpha=1.5), base=pair[0], model=pair[1], output=tmp_path / "local")
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "local" / path.name).read_bytes()


@pytest.mark.slow
def test_an_output_is_verified_from_the_cache_alone_and_without_its_sources_in_part(surgery_on_hub, pair):
    surgery = surgery_on_hub
    assert surgery("lox", "org/base", "org/aligned", "-o", "out", "-q").returncode == 0
    surgery.hub.close()
    cached = surgery("verify", "out", "--recompute", "--strict", HF_HUB_OFFLINE="1")
    assert cached.returncode == 0, cached.stderr
    assert "identical" in cached.stdout
    assert "could not be reached" in error_line(surgery("verify", "out", "--recompute"), 5)
    part = surgery("verify", "out")
    assert part.returncode == 0, part.stderr
    assert "could not be reached" in part.stderr
    assert "identical" not in part.stdout


@pytest.mark.slow
def test_a_plan_of_models_on_the_hub_writes_nothing(surgery_on_hub, pair, tmp_path):
    done = surgery_on_hub("lox", "org/base", "org/aligned", "--plan", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["tensors"]) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"made", "home"}


@pytest.mark.slow
def test_models_on_the_hub_in_the_wrong_order_are_refused(surgery_on_hub, pair):
    assert "look swapped" in error_line(surgery_on_hub("lox", "org/aligned", "org/base"), 3)


def test_a_gated_model_ends_in_one_line_with_the_page(surgery_on_hub, pair, tmp_path):
    surgery_on_hub.hub.repositories["org/aligned"].gated = True
    surgery_on_hub.hub.tokens.add(TOKEN)
    text = error_line(surgery_on_hub("lox", "org/base", "org/aligned", HF_TOKEN=TOKEN), 5)
    assert f"{surgery_on_hub.hub.url}/org/aligned" in text
    assert TOKEN not in text
    assert not list(tmp_path.glob("aligned-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("org/base", "org/nothing"), 5, "org/nothing"),
        (("org/base@no-such", "org/aligned"), 5, "no-such"),
        (("hf://org", "org/aligned"), 2, "hf://ORG/NAME"),
        (("./org/base", "org/aligned"), 3, "no folder ./org/base"),
        (("demo:xyz", "org/aligned"), 3, "demo:aligned"),
        (("org/base", "org/base"), 3, "org/base@"),
    ],
)
def test_a_source_that_is_none_ends_in_one_line(arguments, code, part, surgery_on_hub, pair):
    assert part in error_line(surgery_on_hub("lox", *arguments), code)


@pytest.mark.slow
def test_a_hub_that_is_down_ends_in_one_line(surgery_on_hub, pair):
    surgery_on_hub.hub.close()
    assert "could not be reached" in error_line(surgery_on_hub("lox", "org/base", "org/aligned"), 5)


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on_when_the_command_is_run_again(surgery_on_hub, pair, tmp_path):
    surgery, tree = surgery_on_hub, surgery_on_hub.hub.repositories["org/aligned"].trees
    shard = tree[commits(surgery)["org/aligned"]]["model-00002-of-00003.safetensors"].sha256
    surgery.hub.faults.append(type(surgery).fault(f"/{shard}$", method="GET", keep=500))
    assert "broke off" in error_line(surgery("lox", "org/base", "org/aligned", "-o", "out"), 5)
    assert not list(tmp_path.glob("out*"))
    surgery.hub.faults.clear()
    before = len(surgery.hub.seen)
    assert surgery("lox", "org/base", "org/aligned", "-o", "out").returncode == 0
    stored = [seen.path for seen in surgery.hub.seen[before:] if seen.origin == "storage"]
    assert [path for path in stored if "org/base" in path] == []
    assert [path for path in stored if shard in path] != []


@pytest.mark.slow
def test_a_limit_of_requests_is_waited_out(surgery_on_hub, pair):
    fault = type(surgery_on_hub).fault
    surgery_on_hub.hub.faults += [
        fault("/api/models/org/base$", status=429, headers={"Retry-After": "1"}, times=1),
        fault("/resolve/.*config.json", status=500, times=1),
    ]
    done = surgery_on_hub("lox", "org/base", "org/aligned", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert all(one.times == 0 for one in surgery_on_hub.hub.faults)


@pytest.mark.slow
def test_an_edit_runs_from_the_cache_alone(surgery_on_hub, pair, tmp_path):
    surgery = surgery_on_hub
    assert surgery("lox", "org/base", "org/aligned", "-o", "first", "-q").returncode == 0
    surgery.hub.close()
    done = surgery("lox", "org/base", "org/aligned", "-o", "second", "-q", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "surgery.json").read_bytes() == (
        tmp_path / "second" / "surgery.json"
    ).read_bytes()
    assert "HF_HUB_OFFLINE" in error_line(surgery("lox", "org/base", "org/other", HF_HUB_OFFLINE="1"), 5)
