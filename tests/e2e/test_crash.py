"""An output is whole or not there: killed anywhere, resumed, replaced, or met by a changed input."""

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import surgery
from surgery import errors, testing
from surgery.checkpoint.staging import JOURNAL, Staging
from surgery.methods.lox import LoX
from surgery.options import Options

CONFIG = {"model_type": "surprise", "torch_dtype": "bfloat16"}
SHARDS = 6
NOT_COMPARED = {"surgery.run.json"}
LIMIT = 120.0

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


def tensors(rows, columns, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{layer}.{part}.weight" for layer in range(layers) for part in ("up", "down")]
    found = {name: torch.randn(rows, columns, generator=generator).bfloat16() for name in names}
    found["norm.weight"] = torch.randn(columns, generator=generator).bfloat16()
    return found


def make_pair(root, *, rows, columns, layers, shards, seed=0):
    base = testing.write_checkpoint(
        root / "base", tensors(rows, columns, layers, seed), CONFIG, shards=shards
    )
    return base, testing.perturbed_copy(base, root / "aligned", seed=seed + 1)


def hashes(folder):
    """SHA-256 of every file of an output, those that tell of the run itself apart."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in NOT_COMPARED
    }


def journal(partial):
    """Whole lines of a journal; none where there is no journal."""
    try:
        data = (partial / JOURNAL).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def finished_shards(partial):
    return [entry["shard"] for entry in journal(partial) if "shard" in entry]


def identities(folder, names):
    """What tells a file that was written again from one that was left alone."""
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in names}


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


# The same in this process, stopped after a given number of shards.


class Stopped(Exception):  # noqa: N818 - it stands for no error of ours
    """Stands for a crash: nothing of the run's own is executed after it."""


@pytest.fixture
def small(tmp_path):
    return make_pair(tmp_path / "in", rows=17, columns=13, layers=2, shards=3)


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def apply(pair, out, *, stop=None, error=Stopped, rank=4, **options):
    """Run LoX; with `stop`, an error after that many shards."""

    def progress(shard, done, total):
        if done == stop:
            raise error

    base, aligned = pair
    method = LoX(rank=rank, alpha=1.5)
    surgery.apply(method, base=base, model=aligned, output=out, options=Options(**options), progress=progress)
    return out


def stopped(pair, out, stop, **more):
    with pytest.raises(Stopped):
        apply(pair, out, stop=stop, **more)
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_bytes_do_not_depend_on_being_resumed(small, tmp_path, stop):
    expected = hashes(apply(small, tmp_path / "whole"))
    partial = stopped(small, tmp_path / "out", stop)
    done = finished_shards(partial)
    assert len(done) == stop
    before = identities(partial, done)
    assert hashes(apply(small, tmp_path / "out")) == expected
    assert identities(tmp_path / "out", done) == before


def test_a_finished_shard_that_was_lost_is_written_again(small, tmp_path):
    expected = hashes(apply(small, tmp_path / "whole"))
    partial = stopped(small, tmp_path / "out", 2)
    (partial / finished_shards(partial)[0]).unlink()
    assert hashes(apply(small, tmp_path / "out")) == expected


def test_a_finished_shard_that_was_damaged_is_not_shipped(small, tmp_path):
    partial = stopped(small, tmp_path / "out", 2)
    flip_a_bit(partial / finished_shards(partial)[0])
    with pytest.raises(errors.OutputError, match="does not read back"):
        apply(small, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def flip_a_bit(path, *, keep_time=False):
    """Change the lowest bit of the file's last number, which stays finite."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shard", [1, 2])
def test_an_input_changed_behind_the_fingerprint_is_caught_by_its_hash(small, tmp_path, side, shard):
    out = tmp_path / "out"
    stopped(small, out, 2)
    flip_a_bit(small[side] / f"model-0000{shard}-of-00003.safetensors", keep_time=True)
    with pytest.raises(errors.InputError, match="changed since the interrupted run") as caught:
        apply(small, out)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert hashes(apply(small, out)) == hashes(apply(small, tmp_path / "afresh"))


def test_an_input_that_visibly_changed_is_another_run(small, tmp_path):
    partial = stopped(small, tmp_path / "out", 1)
    shard = small[1] / "model-00002-of-00003.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(errors.UsageError, match="other aligned"):
        apply(small, tmp_path / "out")
    assert finished_shards(partial)


def test_an_input_that_changes_while_it_is_read_is_refused(small, tmp_path):
    shard = small[1] / "model-00001-of-00003.safetensors"

    def progress(name, done, total):
        if done == 2:
            flip_a_bit(shard)

    with pytest.raises(errors.InputError, match="changed"):
        surgery.apply(LoX(rank=4), base=small[0], model=small[1], output=tmp_path / "out", progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    "other", [{"rank": 5}, {"seed": 1}, {"rounding": "stochastic"}, {"dtype": "float32"}]
)
def test_other_options_do_not_resume_a_run_and_leave_it_as_it_is(small, tmp_path, other):
    partial = stopped(small, tmp_path / "out", 2)
    before = identities(partial, os.listdir(partial))
    with pytest.raises(errors.UsageError, match="other options") as caught:
        apply(small, tmp_path / "out", **other)
    assert caught.value.exit_code == 2
    assert identities(partial, os.listdir(partial)) == before
    apply(small, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(apply(small, tmp_path / "whole"))


def test_overwrite_begins_afresh_where_another_run_was_left(small, tmp_path):
    stopped(small, tmp_path / "out", 2, rank=5)
    apply(small, tmp_path / "out", overwrite=True)
    assert hashes(tmp_path / "out") == hashes(apply(small, tmp_path / "whole"))


@pytest.mark.parametrize("place", ["journal", "before", "after"])
def test_a_crash_at_the_last_step_is_resumed_to_the_same_bytes(small, tmp_path, monkeypatch, place):
    """Between the journal's end and the rename, and between an exchange and the old output's end."""
    expected = hashes(apply(small, tmp_path / "whole"))
    out, replace = tmp_path / "out", place == "after"
    if replace:
        apply(small, out, rank=2)

    def crash(*_, **__):
        raise Stopped

    with monkeypatch.context() as broken:
        if place == "journal":
            broken.setattr(Staging, "commit", crash)
        elif place == "before":
            broken.setattr(os, "rename", crash)
        else:
            broken.setattr(shutil, "rmtree", crash)
        with pytest.raises(Stopped):
            apply(small, out, overwrite=replace)
    assert out.exists() is replace
    assert (tmp_path / "out.partial").exists()
    assert hashes(apply(small, out, overwrite=replace)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def by_name(folder):
    return {name: tensor.view(torch.int16) for name, tensor in testing.read_tensors(folder).items()}


def test_bytes_of_a_tensor_do_not_depend_on_the_order_or_the_files_it_stands_in(tmp_path):
    pairs = []
    for number, shards in enumerate((1, 3, 4)):
        root = tmp_path / f"in-{number}"
        held = {"base": tensors(17, 13, 3, 0), "aligned": tensors(17, 13, 3, 0)}
        generator = torch.Generator().manual_seed(1)
        held["aligned"] = {
            name: testing.aligned_like(tensor, generator) for name, tensor in held["aligned"].items()
        }
        names = list(held["base"])
        random.Random(number).shuffle(names)
        for side, found in held.items():
            ordered = {name: found[name] for name in names}
            testing.write_checkpoint(root / side, ordered, CONFIG, shards=shards)
        pairs.append((root / "base", root / "aligned"))
    outputs = [by_name(apply(pair, tmp_path / f"out-{number}")) for number, pair in enumerate(pairs)]
    for other in outputs[1:]:
        assert other.keys() == outputs[0].keys()
        assert all(torch.equal(other[name], outputs[0][name]) for name in other)
    assert not torch.equal(outputs[0]["layers.0.up.weight"], by_name(pairs[0][1])["layers.0.up.weight"])


# Replacing an output.


class Watch(threading.Thread):
    """Looks at a folder again and again; `faults` says what was not whole."""

    def __init__(self, out):
        super().__init__(daemon=True)
        self.out, self.seen, self.faults = out, set(), []
        self.samples = 0
        self._stop_now = threading.Event()

    def run(self):
        while not self._stop_now.is_set():
            self._look()

    def _look(self):
        try:
            descriptor = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self.faults.append(error)
            return
        try:
            names = frozenset(os.listdir(descriptor))
            same = os.fstat(descriptor).st_ino == os.stat(self.out).st_ino
        except OSError as error:
            self.faults.append(error)
            return
        finally:
            os.close(descriptor)
        # A folder that was exchanged while it was listed is no longer the output.
        if same:
            self.samples += 1
            self.seen.add(names)

    def stop(self):
        self._stop_now.set()
        self.join(timeout=LIMIT)
        assert not self.is_alive()


def watched(out, action):
    watch = Watch(out)
    watch.start()
    try:
        while not watch.samples and not watch.faults:
            time.sleep(0.001)
        action()
    finally:
        watch.stop()
    return watch


def test_an_output_is_whole_at_every_moment_while_it_is_replaced(small, tmp_path):
    out = apply(small, tmp_path / "out")
    names = frozenset(os.listdir(out))
    first = out.stat().st_ino

    def replace_often():
        for rank in (2, 3, 5):
            apply(small, out, rank=rank, overwrite=True)

    watch = watched(out, replace_often)
    assert not watch.faults
    assert watch.seen == {names}
    assert watch.samples > 20
    assert out.stat().st_ino != first
    assert json.loads((out / "surgery.json").read_text())["options"]["rank"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_replacement_in_two_steps_would_be_seen(small, tmp_path):
    out = apply(small, tmp_path / "out")
    aside = tmp_path / "aside"

    def remove_and_put_back():
        out.rename(aside)
        time.sleep(0.05)
        aside.rename(out)

    assert watched(out, remove_and_put_back).faults


@pytest.mark.parametrize("error", [Stopped, errors.InputError, errors.ResourceError])
def test_a_failure_while_replacing_leaves_the_old_output_as_it_was(small, tmp_path, error):
    out = apply(small, tmp_path / "out", rank=2)
    before, names = hashes(out), os.listdir(out)
    identity = identities(out, names)
    with pytest.raises(error):
        apply(small, out, stop=2, error=error, overwrite=True)
    assert hashes(out) == before
    assert identities(out, os.listdir(out)) == identity
    assert (tmp_path / "out.partial").exists() is (error is not errors.InputError)
    apply(small, out, overwrite=True)
    assert hashes(out) != before


def test_two_runs_at_once_do_not_share_an_output(small, tmp_path):
    refusals = []

    def second(*_):
        with pytest.raises(errors.UsageError, match="another run is writing"):
            apply(small, tmp_path / "out")
        refusals.append(1)

    surgery.apply(
        LoX(rank=4, alpha=1.5), base=small[0], model=small[1], output=tmp_path / "out", progress=second
    )
    assert len(refusals) == 3
    assert hashes(tmp_path / "out") == hashes(apply(small, tmp_path / "whole"))


def test_folders_above_the_output_are_made_and_nothing_is_left_beside_it(small, tmp_path):
    apply(small, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "out"]
