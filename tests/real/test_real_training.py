"""The training methods on real weights: a few steps, merged, and held to the adapter that was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

DATA = {
    "vaccine": ("aligned",),
    "t-vaccine": ("aligned", "harmful"),
    "circuit-breakers": ("harmful", "retain"),
    "booster": ("aligned", "harmful"),
    "condition-number": ("harmful", "retain"),
    "repnoise": ("aligned", "harmful"),
    "tar": ("harmful", "retain"),
    "mlac": ("aligned", "harmful", "retain"),
}
# Of the methods that simulate attackers: an adapter as for the others, and attacks that end.
MORE = {
    "tar": ("--no-full", "--inner-steps", "16", "--adversary-lr", "1e-3"),
    "mlac": ("--inner-steps", "2"),
}
LONG = ("t-vaccine", "circuit-breakers", "booster", "condition-number", "repnoise", "tar", "mlac")
SETS = {"aligned": "demo:refusals", "harmful": "demo:harmful", "retain": "demo:benign"}
# The papers' settings, but for the length of the run and the size of a step.
BRIEF = ("--preset", "paper", "--steps", "2", "--batch-size", "4", "--max-length", "64", "--warmup", "0")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.nightly) if name in LONG else name for name in DATA]
)
def test_a_trained_model_is_the_model_and_its_adapter(pairs, command, tmp_path, method):
    model, out = pairs["short"].aligned, tmp_path / "out"
    data = [word for name in DATA[method] for word in (f"--{name}-data", SETS[name])]
    done = command(
        method,
        model.folder,
        *data,
        *BRIEF,
        *MORE.get(method, ()),
        "--lora-alpha",
        16,
        "-o",
        out,
        "--keep-adapter",
        "--json",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    merged, factors = type(model)(out), load_file(tmp_path / "out-adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "out-adapter" / "adapter_config.json").read_text())
    scale, changed = settings["lora_alpha"] / settings["r"], 0
    for name in model:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_B.weight" not in factors:
            assert torch.equal(merged[name].view(torch.uint8), model[name].view(torch.uint8)), name
            continue
        down, up = (factors[f"{key}.lora_{side}.weight"].double() for side in "AB")
        wanted = scale * up @ down
        stored = merged[name].double() - model[name].double()
        if not wanted.any():
            assert not stored.any(), name
            continue
        changed += 1
        retention = float((stored * wanted).sum() / wanted.square().sum())
        assert retention == pytest.approx(1, abs=0.02), name
        upside_down = wanted.flip(0)
        assert float((stored * upside_down).sum() / upside_down.square().sum()) < 0.9, name  # control
    assert changed == report["merge"]["edited"] > 20
    assert report["merge"]["retention"] == pytest.approx(1, abs=5e-3)
    assert command("verify", out, "-q").returncode == 0
    shutil.rmtree(out)
