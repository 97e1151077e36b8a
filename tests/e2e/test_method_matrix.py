"""Every method takes a step on every architecture, merges and reloads, or is refused by name with the reason."""

import json
import shutil

import matrix
import pytest

pytestmark = pytest.mark.slow


# What the other tests train least, in every run; the rest in the nightly one.
SOON = ("Qwen3-MoE",)


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in SOON else pytest.param(name, marks=pytest.mark.nightly)
        for name in matrix.ARCHITECTURES
    ],
)
def test_an_architecture_is_as_the_table_says(tmp_path, request, architecture):
    model = matrix.model_folder(tmp_path / "model", architecture)
    data = matrix.data_files(tmp_path)
    row = {}
    for name in matrix.METHODS:
        folder = tmp_path / "work"
        folder.mkdir()
        row[name] = matrix.cell(name, model, data, folder)
        shutil.rmtree(folder)
    known = json.loads(matrix.GOLDEN.read_text()) if matrix.GOLDEN.exists() else {}
    if request.config.getoption("--update-goldens"):
        known[architecture] = row
        matrix.GOLDEN.write_text(json.dumps(known, indent=2) + "\n")
    assert row == known[architecture]
