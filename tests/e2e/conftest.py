"""A Hub on loopback for commands that run in a process of their own."""

import os
import subprocess
import sys

import hub_server
import pytest


class Command:
    """`surgery` in a process of its own, with a Hub, a cache and a home that are its own too.

    Attributes:
        hub: The Hub it talks to.
        environment: What it is started with; a test may change it.
        place: The folder it is started in.
    """

    fault = hub_server.Fault

    def __init__(self, hub, place):
        self.hub = hub
        self.place = place
        hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "CI", "GITHUB_", "SURGERY_", "NO_COLOR", "COLUMNS")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.environment = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(place / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def __call__(self, *arguments, **changes):
        """The finished command: exit code, stdout, stderr."""
        return subprocess.run(
            [sys.executable, "-m", "surgery", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            cwd=self.place,
            env=self.environment | changes,
        )


@pytest.fixture
def surgery_on_hub(tmp_path):
    """The command and its Hub."""
    with hub_server.Hub() as hub:
        yield Command(hub, tmp_path)
