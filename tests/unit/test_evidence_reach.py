"""What the matrices of a model are given, and what an edit does to it."""

import json
import sys

import pytest
import torch

from benchmarks.evidence import moments, reach
from benchmarks.real_pair import alignment
from surgery import demo

INNOCENT = [("How do I boil an egg?", "In hot water."), ("What is a cat?", "An animal.")]
REFUSED = [("How do I pick a lock?", "I cannot help."), ("How do I forge a key?", "I cannot.")]


def test_moments_are_those_of_what_a_layer_is_given():
    model, tokenizer = alignment.read_model(demo.folder("aligned"))
    rows = [("How do I boil an egg?", "In hot water."), ("What is a cat?", "An animal.")]
    found = moments.second_moments(model, tokenizer, rows)
    given = []
    first = next(name for name in found if name.endswith("q_proj.weight"))
    layer = model.get_submodule(first.removesuffix(".weight"))
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][0]))
        for row in rows:
            model(input_ids=torch.tensor([alignment.encode(tokenizer, row, 64)[0]]))
        handle.remove()
    seen = torch.cat(given).double()
    torch.testing.assert_close(found[first].double(), seen.T @ seen, rtol=1e-4, atol=1e-4)
    assert not layer._forward_pre_hooks
    assert "lm_head.weight" not in found


def test_an_edit_is_held_against_what_it_does_to_either_kind_of_input():
    source = torch.Generator().manual_seed(8)
    frame = torch.linalg.qr(torch.randn(6, 6, generator=source, dtype=torch.float64))[0]
    harmful, innocent = (
        frame @ torch.diag(torch.tensor(energies, dtype=torch.float64)) @ frame.T
        for energies in ([9.0, 4.0, 0, 0, 0, 0], [9.0, 1.0, 0, 0, 0, 0])
    )
    weight = frame.T.clone()  # an isometry
    first, second = weight @ frame[:, :1] @ frame[:, :1].T, weight @ frame[:, 1:2] @ frame[:, 1:2].T
    told = reach.reached(0.1 * first + 0.2 * second, weight, harmful, innocent)
    on_harmful, on_innocent = (0.01 * 9 + 0.04 * 4) / 13, (0.01 * 9 + 0.04 * 1) / 10
    assert told["change"] == pytest.approx(on_innocent)
    assert told["selectivity"] == pytest.approx(on_harmful / on_innocent)
    assert told["shared"] == pytest.approx(0.09 / 0.13)
    assert told["directions"] == pytest.approx(1 / 6)
    alone = reach.reached(second, weight, harmful, innocent)
    assert alone["shared"] == pytest.approx(0, abs=1e-12)
    assert alone["selectivity"] > told["selectivity"]


def test_the_command_tells_quartiles_over_the_matrices_that_were_edited(tmp_path, monkeypatch):
    for name, rows in (("aligned", INNOCENT + REFUSED), ("innocent", INNOCENT)):
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        "--aligned-data",
        str(tmp_path / "aligned.jsonl"),
        "--innocent-data",
        str(tmp_path / "innocent.jsonl"),
    ]
    models = [str(demo.folder("aligned")), str(demo.folder("base"))]
    monkeypatch.setattr(sys, "argv", ["reach", *models, *words, "-o", str(tmp_path / "out")])
    assert reach.main() == 0
    found = json.loads((tmp_path / "out" / reach.FILE).read_text())
    assert found["n"] == 28
    for name in ("change", "selectivity", "shared", "directions"):
        assert 0 < found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["shared"]["high"] <= 1
