"""Every test: seeded, offline, quiet, and leaving nothing behind."""

import os

# Read when torch and the Hugging Face libraries are imported, so set before either is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton's interpreter runs its kernels where there is no GPU; read when the first kernel is decorated.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "200"

import json
import socket
from pathlib import Path

import pytest
import torch

_CONNECT = socket.socket.connect


def _loopback_only(self, address):
    """Refuse any connection that would leave this machine."""
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if not (host == "localhost" or host == "::1" or host.startswith("127.")):
            raise AssertionError(f"a test tried to reach {host}")
    return _CONNECT(self, address)


@pytest.fixture(autouse=True)
def _seeded_and_offline(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(socket.socket, "connect", _loopback_only)


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite the files in tests/golden")


@pytest.fixture
def golden(request):
    """Compare a JSON document with a file in tests/golden; with --update-goldens write it instead."""

    def compare(document, name):
        path = Path(__file__).parent / "golden" / name
        text = json.dumps(document, indent=2) + "\n"
        if request.config.getoption("--update-goldens"):
            path.write_text(text, encoding="utf-8")
        assert json.loads(path.read_text(encoding="utf-8")) == document

    return compare
