"""A Hub on loopback for the real client in this process, and arithmetic by one thread."""

import threading
import time
from collections import defaultdict

import hub_server
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Small matrices are faster so, and sums come out the same beside any other load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def slept():
    """The waits that were asked for, by thread."""
    return defaultdict(list)


@pytest.fixture(scope="module")
def _client():
    """The connections of the client are closed once a file: making a client reads all certificates, which is slow."""
    from huggingface_hub import close_session

    yield
    close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path, slept, _client):
    """A Hub that the client of this process talks to, with an empty cache; waiting takes no time."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.Hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(time, "sleep", lambda seconds: slept[threading.get_ident()].append(seconds))
        yield server


@pytest.fixture
def offline(monkeypatch):
    """`offline()`: from now on no request may be made."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
