"""A pair of checkpoints to spoil, and a process left as it was."""

import shutil
import signal

import pytest
import torch
from refusals import Pair

from surgery import testing


@pytest.fixture(scope="module")
def master(tmp_path_factory, request):
    """A good pair, of the tensors that the test's module names in `weights` and `CONFIG`."""
    root = tmp_path_factory.mktemp("master")
    module = request.module
    testing.write_checkpoint(root / "base", module.weights(), module.CONFIG, shards=2)
    testing.perturbed_copy(root / "base", root / "aligned")
    return root


@pytest.fixture
def pair(master, tmp_path):
    """A copy of it that the test may spoil."""
    shutil.copytree(master, tmp_path / "in")
    inside = tmp_path / "in"
    return Pair(tmp_path, inside / "aligned", inside / "base", tmp_path / "out")


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch):
    """The command takes over signals and threads of its process, which here is pytest's."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("SURGERY_DEBUG", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
