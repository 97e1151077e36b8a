"""An output is whole or not there: killed anywhere, resumed, replaced, or met by a changed input."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time

import pytest
from crashing import (
    LIMIT,
    SHARDS,
    finished_shards,
    hashes,
    identities,
    make_pair,
)

# Imports once, then runs one command at a time in a forked process: importing torch anew for each of the
# two dozen runs would take longer than the runs.
NURSERY = """
import json, os, sys
from surgery.cli import app, edit
from surgery import finishing, pipeline
for line in sys.stdin:
    arguments, errors = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((0, os.devnull), (1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        app.main(arguments)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Runs `surgery` in processes that can be killed, one at a time."""

    def __init__(self, errors):
        self.errors = errors
        command = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.child = None

    def _line(self):
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        if not ready:
            self.close()
            raise AssertionError("a run did not end in time")
        return int(self.process.stdout.readline())

    def start(self, *arguments):
        """Start a command and return the id of its process."""
        job = [[str(argument) for argument in arguments], str(self.errors)]
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.child = self._line()
        return self.child

    def wait(self):
        """Wait for the command's end; its exit code, or minus the signal that ended it."""
        code = self._line()
        self.child = None
        return code

    def run(self, *arguments):
        self.start(*arguments)
        return self.wait()

    def message(self):
        """The last line that the command left on stderr."""
        return self.errors.read_text().splitlines()[-1]

    def close(self):
        if self.child is not None and self.process.poll() is None:
            os.kill(self.child, signal.SIGKILL)
            self.child = None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pair on which a run takes a second or two."""
    return make_pair(
        tmp_path_factory.mktemp("large"), rows=620, columns=480, layers=SHARDS, shards=SHARDS, seed=3
    )


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    found = Nursery(tmp_path_factory.mktemp("nursery") / "stderr")
    yield found
    found.close()


@pytest.fixture(scope="module")
def whole(large, nursery, tmp_path_factory):
    """Hashes of an uninterrupted run, and about how long a shard takes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    assert nursery.run(*command(large, out)) == 0
    assert len(list(out.glob("*.safetensors"))) == SHARDS
    return hashes(out), (time.monotonic() - started) / SHARDS


def command(pair, out, *more):
    return "lox", pair[0], pair[1], "--rank", "4", "--alpha", "1.5", "-o", out, *more


def interrupt(nursery, pair, out, number, after, delay=0.0):
    """Start a run and send it a signal once `after` shards are finished; its exit code."""
    child = nursery.start(*command(pair, out))
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if out.exists() or (partial.exists() and len(finished_shards(partial)) >= after):
            break
        time.sleep(0.001)
    time.sleep(delay)
    # The nursery reaps the run only to report it, so the id is not another's even if the run has ended.
    if not select.select([nursery.process.stdout], [], [], 0)[0]:
        os.kill(child, number)
    return nursery.wait()


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_and_resumed_writes_the_same_bytes(
    large, nursery, whole, tmp_path
):
    expected, shard_seconds = whole
    generator = random.Random(20250611)
    killed_with_work_done = 0
    for moment in range(10):
        out = tmp_path / f"out-{moment}"
        partial = tmp_path / f"out-{moment}.partial"
        after, delay = generator.randrange(SHARDS + 1), generator.random() * shard_seconds
        code = interrupt(nursery, large, out, signal.SIGKILL, after, delay)
        assert code in (0, -signal.SIGKILL)
        assert out.exists() is (not partial.exists())
        if out.exists():
            # Killed after the last rename, or too late: what is there is whole.
            assert hashes(out) == expected
            continue
        done = finished_shards(partial)
        before = identities(partial, done)
        killed_with_work_done += bool(done)
        assert nursery.run(*command(large, out)) == 0
        assert hashes(out) == expected
        assert identities(out, done) == before
        assert not partial.exists()
    assert killed_with_work_done >= 3, killed_with_work_done


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(large, nursery, whole, tmp_path):
    expected, _ = whole
    out = tmp_path / "out"
    for after in (1, 2, 3):
        # No delay: how long a shard takes varies by more than what is left of the run.
        assert interrupt(nursery, large, out, signal.SIGKILL, after) == -signal.SIGKILL
        assert len(finished_shards(tmp_path / "out.partial")) >= after
    assert nursery.run(*command(large, out)) == 0
    assert hashes(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_its_code_and_the_run_can_go_on(large, nursery, whole, tmp_path, number):
    out = tmp_path / "out"
    code = interrupt(nursery, large, out, number, after=2)
    assert code == 128 + number
    assert nursery.message() == "error: interrupted; run the same command again to resume"
    assert "Traceback" not in nursery.errors.read_text()
    assert not out.exists()
    done = finished_shards(tmp_path / "out.partial")
    assert len(done) >= 2
    before = identities(tmp_path / "out.partial", done)
    assert nursery.run(*command(large, out)) == 0
    assert hashes(out) == whole[0]
    assert identities(out, done) == before


@pytest.mark.slow
def test_other_weights_are_seen_by_the_hashes(large, nursery, whole, tmp_path):
    assert nursery.run(*command(large, tmp_path / "out", "--alpha", "1.25")) == 0
    found = hashes(tmp_path / "out")
    assert found.keys() == whole[0].keys()
    assert sum(found[name] != whole[0][name] for name in found) > SHARDS
