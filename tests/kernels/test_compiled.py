"""What Triton's interpreter cannot show, read from kernels compiled for a GPU that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("compiled.py")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, PROGRAM], env=environment, check=True, timeout=250, capture_output=True, text=True
    )
    return json.loads(run.stdout)


def test_every_kernel_compiles_and_fits_the_shared_memory_of_any_gpu(kernels):
    assert len(kernels) == 24
    assert {name: kernel["shared"] for name, kernel in kernels.items() if kernel["shared"] > 48 << 10} == {}


def test_products_of_float32_are_never_taken_in_tf32(kernels):
    assert {name for name, kernel in kernels.items() if "tf32" in kernel["products"]} == set()


def test_logits_of_bfloat16_run_on_the_tensor_cores(kernels):
    """A control of the reading, too: products that are taken there are found."""
    assert {name for name, kernel in kernels.items() if "bf16" in kernel["products"]} == {
        "4.vocabulary_entropy_triton._sums.bf16",
        "5.vocabulary_entropy_triton._gradient.bf16",
    }
