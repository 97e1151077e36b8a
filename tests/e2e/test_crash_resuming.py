"""An output is whole or not there: runs stopped in this process, changed inputs, and outputs that are replaced."""

import json
import os
import random
import shutil
import threading
import time

import pytest
import torch
from crashing import CONFIG, LIMIT, finished_shards, hashes, identities, make_pair, tensors

import surgery
from surgery import errors, testing
from surgery.checkpoint.staging import Staging
from surgery.methods.lox import LoX
from surgery.options import Options


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
    # Held open, so that no folder to come can be given its number.
    first = os.open(out, os.O_RDONLY)

    def replace_often():
        for rank in (2, 3, 5):
            apply(small, out, rank=rank, overwrite=True)

    try:
        watch = watched(out, replace_often)
        assert out.stat().st_ino != os.fstat(first).st_ino
    finally:
        os.close(first)
    assert not watch.faults
    assert watch.seen == {names}
    assert watch.samples > 20
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
