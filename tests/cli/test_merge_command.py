"""`surgery merge` on the command line: what it writes, prints and refuses, in one line and without a trace."""

import json

import pytest
import torch
from refusals import Pair, refused, run
from safetensors.torch import load_file, save_file

import surgery
from surgery import testing
from surgery.options import Options
from surgery.testing import read_tensors

CONFIG = {"model_type": "surprise", "architectures": ["SurpriseForCausalLM"], "torch_dtype": "bfloat16"}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def weights():
    generator = torch.Generator().manual_seed(7)
    shapes = {f"{UP}.weight": (37, 24), f"{Q}.weight": (24, 24), "model.norm.weight": (24,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def make_adapter(folder, *, rank=3, rows=37, module=UP, **settings):
    """An adapter of one module."""
    generator = torch.Generator().manual_seed(3)
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, 24, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(rows, rank, generator=generator) * 0.1,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def place(tmp_path):
    """A model and an adapter of it; where the output would go."""
    inside = tmp_path / "in"
    testing.write_checkpoint(inside / "model", weights(), CONFIG, shards=2)
    make_adapter(inside / "adapter")
    return Pair(tmp_path, inside / "model", inside / "adapter", tmp_path / "out")


def words(place, *more):
    return ["merge", place.aligned, place.base, "-o", place.out, *more]


def test_the_command_writes_what_the_api_writes(place, capfd):
    code, out, err = run(capfd, words(place, "--json", "--weight", "0.5", "--rounding", "nearest"))
    assert code == 0, err
    document = json.loads(out)
    assert document["edited"] == 1
    assert document["retention"] > 0.9
    assert "certified_error_max" not in document
    api = place.root / "api"
    surgery.merge(place.aligned, [place.base], weights=[0.5], output=api, options=Options(rounding="nearest"))
    assert (api / "surgery.json").read_bytes() == (place.out / "surgery.json").read_bytes()
    code, out, _ = run(capfd, ["verify", place.out, "--recompute", "--strict"])
    assert code == 0
    assert "identical" in out


def test_what_is_printed_for_people(place, capfd):
    code, out, _ = run(capfd, words(place, "--plan"))
    assert code == 0
    assert not place.out.exists()
    assert f"edit  {UP}.weight" in out
    assert "rank 3    LoRA of rank 3 in adapter" in out
    assert "model model, adapter adapter: adapter does not say which model it belongs to" in out
    code, out, err = run(capfd, words(place))
    assert code == 0
    assert "W' = W + s B A, rank 3, s = 2" in out
    assert "1 edited, 2 copied, 0 unchanged" in out
    assert "certified" not in out
    assert "[2/2]" in err
    assert run(capfd, words(place, "-q", "--overwrite")) == (0, "", "")


def test_without_an_output_the_model_names_it(place, capfd, monkeypatch):
    monkeypatch.chdir(place.root)
    assert run(capfd, ["merge", "in/model", "in/adapter", "-q"])[0] == 0
    own, found = read_tensors(place.aligned), read_tensors(place.root / "model-merged")
    assert [name for name in own if not torch.equal(own[name], found[name])] == [f"{UP}.weight"]


def nan_factors(place):
    file = place.base / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}{UP}.lora_B.weight"][3, 1] = torch.nan
    save_file(tensors, file)
    return [f"{UP}.lora_B.weight of adapter holds NaN", "take an earlier checkpoint"]


def nan_weight(place):
    file = next(file for file in place.aligned.glob("*.safetensors") if f"{UP}.weight" in load_file(file))
    tensors = load_file(file)
    tensors[f"{UP}.weight"][0, 0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    return [f"{UP}.weight in the model's checkpoint holds NaN or infinity"]


def another_model(place):
    make_adapter(place.base, rows=36)
    return [f"{UP}.lora_A.weight", "[36, 24]", "[37, 24]", "another model"]


def another_rank(place):
    make_adapter(place.base, r=4)
    return [f"{UP}.lora_A.weight of adapter has rank 3", "adapter_config.json says 4"]


def no_such_module(place):
    make_adapter(place.base, module="model.layers.9.mlp.up_proj")
    return ["cannot be built by transformers", "merge this adapter with PEFT"]


def no_config(place):
    (place.base / "adapter_config.json").unlink()
    return ["adapter_config.json"]


def pickled(place):
    (place.base / "adapter_model.safetensors").rename(place.base / "adapter_model.bin")
    return ["a pickle, which can hide code", "save it again"]


def truncated(place):
    file = place.base / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    return ["adapter/adapter_model.safetensors is truncated", "download it again"]


def an_adapter_for_a_model(place):
    for file in place.aligned.iterdir():
        file.unlink()
    make_adapter(place.aligned)
    return ["model has an adapter only"]


def all_zero(place):
    file = place.base / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    return ["every delta is zero", "give an adapter that was trained"]


@pytest.mark.parametrize(
    "spoil",
    [nan_factors, nan_weight, another_model, another_rank, no_such_module, no_config, pickled, truncated,
     an_adapter_for_a_model, all_zero],
)  # fmt: skip
def test_what_cannot_be_merged_ends_in_one_line_and_leaves_no_trace(place, capfd, spoil):
    said = spoil(place)
    refused(capfd, place, 3, said, words(place, "-q"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--weight", "0"], ["--weight is 0"]),
        (["--weight", "1", "--weight", "2"], ["2 --weight and 1 adapters"]),
        (["--weight", "much"], ["--weight"]),
        (["--as-lora"], ["--as-lora"]),
        (["--json", "-q"], ["contradict"]),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_usage_errors(place, capfd, more, said):
    refused(capfd, place, 2, said, words(place, *more))


def test_an_output_inside_an_input_is_refused(place, capfd):
    refused(
        capfd, place, 2, ["share a folder"], ["merge", place.aligned, place.base, "-o", place.base / "out"]
    )
    refused(capfd, place, 2, ["Missing argument"], ["merge", place.aligned])
