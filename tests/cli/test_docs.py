"""Every command in the README and the docs runs as it is written, page by page, in one folder."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from surgery.cli.app import main
from surgery.testing import tiny_pair

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run by `.ci/run` (make), by the nightly tests (the recipe), or not ours (pip).
ELSEWHERE = ("make ", "pip install ", "python -m surgery.demo", "git clone ", "cd ")

# Run against a Hub on loopback by e2e/test_push_to_hub.py and test_ci_command.py.
NEED_A_HUB = {"release.md", "ci.md"}


def commands(page):
    """Lines of a page's indented blocks that are commands, comments cut off."""
    lines = (line[4:] for line in page.read_text().splitlines() if line.startswith("    "))
    shell = (line.partition("  #")[0].strip() for line in lines)
    return [line for line in shell if re.match(r"(surgery|accelerate|make|pip|python|git|cd) ", line)]


def snippets(page):
    """Indented blocks of Python."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", page.read_text(), re.MULTILINE)
    return [
        textwrap.dedent(block) for block in blocks if re.search(r"^    (?:import|from) ", block, re.MULTILINE)
    ]


def launched(command):
    """Run a launcher's command, one thread a process, on the loopback interface alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


# Pages whose commands measure or train models, for which the fast tests have no time.
LONG = {
    "attacks.md", "evaluate.md", "gate.md", "getting-started.md", "methods.md", "sweep.md", "training.md",
}  # fmt: skip
OFFLINE = [
    pytest.param(page, marks=pytest.mark.slow) if page.name in LONG else page
    for page in PAGES
    if page.name not in NEED_A_HUB
]


@pytest.mark.parametrize("page", OFFLINE, ids=lambda page: getattr(page, "name", None))
def test_every_command_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pair(tmp_path / "ORG")
    for command in commands(page):
        if command.startswith(ELSEWHERE):
            continue
        program, *words = shlex.split(command)
        if program == "accelerate":
            launched([sys.executable, "-m", "accelerate.commands.launch", *words[1:]])
            continue
        assert program == "surgery", command
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in snippets(page):
        exec(compile(code, page.name, "exec"), {})


def test_the_readme_shows_the_two_commands_first():
    first, second = commands(ROOT / "README.md")[:2]
    assert (first, second) == ("make demo", "make test")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_is_in_the_docs():
    from surgery import methods

    text = "".join(page.read_text() for page in PAGES)
    for name in [
        *methods.names(),
        "attack",
        "card",
        "ci",
        "evaluate",
        "gate",
        "inspect",
        "landscape",
        "merge",
        "push",
        "reproduce",
        "sign",
        "sweep",
        "verify",
    ]:
        assert f"surgery {name} " in text
