"""Commands that must fail: run in this process, and held to leaving no trace."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery.cli.app import main


@dataclass
class Pair:
    """Two folders side by side; `out` is where the output would go."""

    root: Path
    aligned: Path
    base: Path
    out: Path

    def folder(self, side):
        return getattr(self, side)

    def command(self, *more):
        return ["lox", str(self.base), str(self.aligned), "--rank", "3", "-o", str(self.out), *more]


def snapshot(root):
    """Everything below a folder: kind, permissions, and content or target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (mode, content)
    return found


def run(capfd, arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return caught.value.code, out, err


def check_message(err, words):
    """One line that starts as errors do and says all of `words`."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])


def refused(capfd, pair, code, words, arguments):
    """Run a command that must fail and must leave no trace."""
    before = snapshot(pair.root)
    found, out, err = run(capfd, arguments)
    assert (found, out) == (code, ""), err
    check_message(err, words)
    after = snapshot(pair.root)
    assert after.keys() == before.keys()
    assert after == before
