"""The rule that picks a backend, in all its branches."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from surgery.errors import UsageError
from surgery.kernels import backend, difference

CPU = torch.ones(2)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Placed:
    """Stands for a tensor on a device that this machine need not have."""

    def __init__(self, device, dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype


@pytest.fixture
def choose(monkeypatch):
    """The rule without the check of its annotations, and with nothing set."""
    monkeypatch.delenv("SURGERY_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = backend.choose
    while hasattr(rule, "__wrapped__"):
        rule = rule.__wrapped__
    return rule


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))


@pytest.mark.parametrize(
    ("tensors", "chosen"),
    [
        ([Placed("cpu")], "torch"),
        ([Placed(FIRST)], "triton"),
        ([Placed(FIRST), Placed(FIRST, torch.bfloat16)], "triton"),
        ([Placed(FIRST), Placed(FIRST, torch.float64)], "torch"),
        ([Placed(FIRST), Placed(SECOND)], "torch"),
        ([Placed(FIRST), Placed("cpu")], "torch"),
        ([Placed("mps")], "torch"),
    ],
    ids=["cpu", "gpu", "half", "float64", "two-gpus", "mixed", "mps"],
)
@pytest.mark.parametrize("said", [None, "auto"])
def test_triton_runs_on_one_gpu_and_torch_elsewhere(tensors, chosen, said, choose, monkeypatch):
    if said:
        monkeypatch.setenv("SURGERY_KERNELS", said)
    assert choose(*tensors) == chosen


def test_a_kernel_that_takes_float64_gets_it(choose):
    assert choose(Placed(FIRST, torch.float64), wide=True) == "triton"


def test_torch_runs_where_triton_is_not_installed(choose, without_triton):
    assert choose(Placed(FIRST)) == "torch"


def test_torch_is_taken_at_its_word(choose, monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", "torch")
    assert choose(Placed(FIRST)) == "torch"


@pytest.mark.parametrize("interpret", [None, "0", ""])
def test_triton_asked_for_on_the_cpu_is_refused(interpret, choose, monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(UsageError, match=r"tensors are on cpu.*Unset it"):
        choose(Placed("cpu"))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ([Placed(FIRST), Placed("cpu")], "cpu and cuda:0"),
        ([Placed(FIRST, torch.float64)], "float64"),
        ([Placed("mps")], "on mps"),
    ],
    ids=["mixed", "float64", "mps"],
)
def test_triton_asked_for_is_never_replaced(tensors, told, choose, monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=told):
        choose(*tensors)


def test_triton_asked_for_and_not_installed_says_how_to_install_it(choose, without_triton, monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    with pytest.raises(UsageError, match="pip install"):
        choose(Placed(FIRST))


def test_the_interpreter_runs_on_the_cpu_only_when_asked_for(choose, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU) == "torch"
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    assert choose(CPU) == "triton"


@pytest.mark.parametrize("word", ["cuda", "", "Triton"])
def test_another_word_is_refused(word, choose, monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", word)
    with pytest.raises(UsageError, match="auto, torch or triton"):
        choose(CPU)


def test_the_choice_decides_which_code_runs(monkeypatch, device):
    """A control: with the twin replaced by one that fails, the operation fails when Triton is asked for."""
    from surgery.kernels import difference_triton

    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(difference_triton, "right_product", broken)
    weights, columns = torch.ones(1, 2, 3, device=device), torch.ones(1, 3, 1, device=device)
    monkeypatch.setenv("SURGERY_KERNELS", "torch")
    assert not difference.right_product(weights, weights, columns).any()
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    with pytest.raises(ZeroDivisionError):
        difference.right_product(weights, weights, columns)


def test_a_manifest_is_told_what_runs(choose, monkeypatch):
    assert backend.recorded("cpu") == {"kernels": "torch"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    found = backend.recorded("cpu")
    assert found == {"kernels": "triton", "triton": importlib.import_module("triton").__version__}


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from surgery.kernels import difference;"
        "from surgery.kernels import vocabulary_entropy, rerouting; ones = torch.ones(1, 2, 3);"
        "assert not difference.right_product(ones, ones, torch.ones(1, 3, 1)).any()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
