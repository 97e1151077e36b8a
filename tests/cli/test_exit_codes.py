"""The exit code tells what kind of thing went wrong, and stderr what to do; an output is whole or absent."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from refusals import check_message, refused, run, snapshot

from surgery import editing, errors, finishing, resources
from surgery.checkpoint import writer
from surgery.cli.app import main

CONFIG = {"model_type": "surprise", "architectures": ["SurpriseForCausalLM"], "torch_dtype": "bfloat16"}
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def weights():
    generator = torch.Generator().manual_seed(11)
    shapes = {"embed_tokens.weight": (29, 24), "norm.weight": (24,), "layers.0.up_proj.weight": (41, 24)}
    shapes |= {f"layers.{layer}.q_proj.weight": (24, 24) for layer in range(3)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def content(folder):
    """What of an output must be the same for every run."""
    return {name: entry for name, entry in snapshot(folder).items() if name != "surgery.run.json"}


# Outputs that cannot be.


def output_exists(pair, side):
    pair.out.mkdir()
    (pair.out / "surgery.json").write_text("{}")
    return ["exists", "choose another --output", "--overwrite"], ()


def output_exists_and_is_not_ours(pair, side):
    pair.out.mkdir()
    (pair.out / "precious").write_text("mine")
    return ["exists", "remove it yourself"], ("--overwrite",)


def output_is_a_file(pair, side):
    pair.out.write_text("mine")
    return ["exists", "remove it yourself"], ("--overwrite",)


def output_is_a_link_to_an_empty_folder(pair, side):
    (pair.root / "elsewhere").mkdir()
    pair.out.symlink_to(pair.root / "elsewhere")
    return ["link", "another --output"], ()


def output_is_a_link_to_an_earlier_output(pair, side):
    (pair.root / "elsewhere").mkdir()
    (pair.root / "elsewhere" / "surgery.json").write_text("{}")
    pair.out.symlink_to(pair.root / "elsewhere")
    return ["link", "another --output"], ("--overwrite",)


def partial_folder_is_a_file(pair, side):
    (pair.root / "out.partial").write_text("mine")
    return ["out.partial", "is a file", "remove it"], ()


def partial_folder_is_not_ours(pair, side):
    (pair.root / "out.partial").mkdir()
    (pair.root / "out.partial" / "precious").write_text("mine")
    return ["out.partial", "did not write", "remove it"], ("--overwrite",)


def output_is_the_input(pair, side):
    pair.out = pair.folder(side)
    return [f"the {side} checkpoint", "choose another --output"], ("--overwrite",)


def output_is_a_link_to_the_input(pair, side):
    pair.out.symlink_to(pair.folder(side))
    return [f"the {side} checkpoint", "choose another --output"], ("--overwrite",)


def output_is_inside_the_input(pair, side):
    pair.out = pair.folder(side) / "deep" / "out"
    return [f"the {side} checkpoint", "choose another --output"], ()


def output_is_around_the_input(pair, side):
    pair.out = pair.folder(side).parent
    return ["checkpoint share a folder", "choose another --output"], ("--overwrite",)


def output_would_be_built_in_the_input(pair, side):
    folder = pair.folder(side)
    (folder / "surgery.json").write_text("{}")
    setattr(pair, side, folder.rename(folder.with_name("out.partial")))
    pair.out = folder.with_name("out")
    return [f"the {side} checkpoint", "choose another --output"], ()


ALONE = (
    output_exists, output_exists_and_is_not_ours, output_is_a_file, output_is_a_link_to_an_empty_folder,
    output_is_a_link_to_an_earlier_output, partial_folder_is_a_file, partial_folder_is_not_ours,
)  # fmt: skip
SIDED = (
    output_is_the_input, output_is_a_link_to_the_input, output_is_inside_the_input,
    output_is_around_the_input, output_would_be_built_in_the_input,
)  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "side"),
    [(spoil, "aligned") for spoil in ALONE]
    + [(spoil, side) for spoil in SIDED for side in ("aligned", "base")],
)
def test_an_output_that_cannot_be_is_refused_and_nothing_is_touched(pair, capfd, spoil, side):
    words, more = spoil(pair, side)
    refused(capfd, pair, 2, words, pair.command("-q", *more))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "there/.."])
def test_an_output_without_a_name_is_refused(pair, capfd, name):
    refused(
        capfd, pair, 2, ["the output is", "name one"], ["lox", str(pair.base), str(pair.aligned), "-o", name]
    )


@pytest.mark.parametrize("name", ["banana", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(pair, capfd, name):
    refused(capfd, pair, 2, [repr(name), "cpu"], pair.command("--device", name))


def test_a_second_run_on_the_same_output_is_refused_while_the_first_lives(pair, capfd):
    partial = pair.root / "out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refused(capfd, pair, 2, ["another run is writing", "wait", "another --output"], pair.command("-q"))
    finally:
        os.close(descriptor)
    assert run(capfd, pair.command("-q"))[0] == 0


# Disk and memory.


def test_too_little_disk_is_refused_before_anything_is_written(pair, capfd, monkeypatch):
    monkeypatch.setattr(resources, "disk_free", lambda path: 5_000)
    refused(capfd, pair, 4, ["the output needs", "free", "another --output"], pair.command("-q"))
    monkeypatch.setattr(resources, "disk_free", lambda path: 9_000_000)
    assert run(capfd, pair.command("-q"))[0] == 0


def test_too_little_memory_is_refused_before_anything_is_written(pair, capfd, monkeypatch):
    monkeypatch.setattr(resources, "memory_available", lambda: 1 << 20)
    refused(capfd, pair, 4, ["needs about", "1 MiB are available", "--edit linear"], pair.command("-q"))


def test_memory_that_runs_out_half_way_is_told_and_the_run_can_go_on(pair, capfd, monkeypatch):
    whole = shutil.copytree(pair.root / "in", pair.root / "second")
    assert (
        run(capfd, ["lox", whole / "base", whole / "aligned", "--rank", "3", "-o", pair.root / "ref"])[0] == 0
    )
    edit = editing.Editor.edit
    calls = []

    def out_of_memory(self, step):
        calls.append(step)
        if len(calls) == 4:
            # As torch's allocator words it.
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
            )
        return edit(self, step)

    with monkeypatch.context() as short:
        short.setattr(editing.Editor, "edit", out_of_memory)
        code, out, err = run(capfd, pair.command("-q"))
    assert (code, out) == (4, "")
    check_message(err, ["memory"])
    assert not pair.out.exists()
    assert run(capfd, pair.command("-q"))[0] == 0
    assert (pair.out / SHARD).read_bytes() == (pair.root / "ref" / SHARD).read_bytes()


class FillingFile:
    """A file on a disk on which `room[0]` bytes are left."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._room[0] -= len(data)
        if self._room[0] < 0:
            raise OSError(28, os.strerror(28))
        return self._file.write(data)


def filling_disk(monkeypatch, room):
    left, real = [room], open

    def opened(path, mode="r", **more):
        file = real(path, mode, **more)
        return FillingFile(file, left) if mode == "wb" else file

    monkeypatch.setattr(writer, "open", opened, raising=False)


@pytest.mark.parametrize("room", [0, 3_000, 6_000, 8_200, 9_000, 11_500])
def test_a_disk_that_fills_half_way_is_told_and_the_same_command_finishes_later(
    pair, capfd, monkeypatch, room
):
    before = snapshot(pair.root / "in")
    with monkeypatch.context() as full:
        filling_disk(full, room)
        code, out, err = run(capfd, pair.command("-q"))
    assert (code, out) == (4, "")
    check_message(err, ["disk", "free", "run the same command again"])
    assert not pair.out.exists()
    assert (pair.root / "out.partial" / "journal.jsonl").is_file()
    assert snapshot(pair.root / "in") == before
    assert run(capfd, pair.command("-q"))[0] == 0
    resumed = content(pair.out)
    shutil.rmtree(pair.out)
    assert run(capfd, pair.command("-q"))[0] == 0
    assert resumed == content(pair.out)


def test_a_disk_with_room_enough_is_not_told(pair, capfd, monkeypatch):
    filling_disk(monkeypatch, 1 << 20)
    assert run(capfd, pair.command("-q"))[0] == 0


# Rights.


@pytest.mark.parametrize("file", [SHARD, INDEX, "config.json"])
@pytest.mark.parametrize("side", ["aligned", "base"])
def test_a_file_that_may_not_be_read_is_named(pair, capfd, monkeypatch, side, file):
    forbidden = str(pair.folder(side) / file)
    real = os.open

    def refusing(path, *arguments, **more):
        if os.fspath(path) == forbidden:
            raise PermissionError(13, os.strerror(13), forbidden)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)
    refused(capfd, pair, 5, [f"no right to read {side}/{file}", "permissions"], pair.command("-q"))


def test_a_repository_that_cannot_be_reached_is_exit_5(pair, capfd):
    arguments = ["lox", "nobody/nothing", str(pair.aligned), "-o", str(pair.out)]
    refused(capfd, pair, 5, ["nobody/nothing", "unset it"], arguments)


# What a run may come to.


def spoil_after(monkeypatch, name, spoil):
    """Let the output be spoilt on its way to the disk, after all of it is written."""
    real = finishing.check_model

    def check(job, staging):
        spoil(staging.path / name)
        real(job, staging)

    monkeypatch.setattr(finishing, "check_model", check)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_output_that_fails_its_own_check_is_exit_6_and_removed(pair, capfd, monkeypatch):
    with monkeypatch.context() as bad:
        spoil_after(bad, SHARD, flip_last_byte)
        refused(capfd, pair, 6, [SHARD, "does not read back", "run again"], pair.command("-q"))
    assert run(capfd, pair.command("-q"))[0] == 0


def test_an_output_that_is_cut_short_is_exit_6_and_removed(pair, capfd, monkeypatch):
    spoil_after(monkeypatch, SHARD, lambda path: os.truncate(path, path.stat().st_size - 2))
    refused(capfd, pair, 6, [SHARD], pair.command("-q"))


def test_success_is_exit_0_for_plan_run_and_verify(pair, capfd):
    before = snapshot(pair.root)
    code, out, err = run(capfd, pair.command("--plan"))
    assert (code, err) == (0, "")
    assert "5 to edit, 1 to copy" in out
    assert snapshot(pair.root) == before
    code, out, err = run(capfd, pair.command("--json"))
    assert code == 0
    assert json.loads(out)["edited"] == 5
    # Tensors of a few hundred entries may miss 99 % of an edit, and that is said.
    assert all(line.startswith(("[", "warning: ")) for line in err.splitlines())
    assert run(capfd, ["verify", pair.out, "-q"]) == (0, "", "")
    assert run(capfd, ["--version"])[0] == 0
    assert run(capfd, ["--help"])[0] == 0


def test_an_output_changed_afterwards_fails_its_verification_with_exit_1(pair, capfd):
    assert run(capfd, pair.command("-q"))[0] == 0
    flip_last_byte(pair.out / SHARD)
    code, out, err = run(capfd, ["verify", pair.out])
    assert (code, out) == (1, "")
    check_message(err, [SHARD])


def test_a_folder_without_a_manifest_cannot_be_verified(pair, capfd):
    code, out, err = run(capfd, ["verify", pair.aligned])
    assert (code, out) == (3, "")
    check_message(err, ["surgery.json"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["lox", "only-one"], "ALIGNED"),
        (["lox", "a", "b", "--rank", "six"], "six"),
        (["lox", "a", "b", "--anchor", "sideways"], "sideways"),
        (["lox", "a", "b", "--ranks", "6"], "--ranks"),
        (["locks", "a", "b"], "locks"),
    ],
)
def test_arguments_that_cannot_be_parsed_are_exit_2(capfd, arguments, word):
    code, out, err = run(capfd, arguments)
    assert (code, out) == (2, "")
    assert word in err
    assert "Traceback" not in err


def test_every_class_of_error_has_the_documented_code():
    codes = {"CheckError": 1, "UsageError": 2, "InputError": 3, "ResourceError": 4, "AccessError": 5}
    codes["OutputError"] = 6
    assert {name: getattr(errors, name).exit_code for name in codes} == codes
    assert errors.Interrupted(signal.SIGINT).exit_code == 130
    assert errors.Interrupted(signal.SIGTERM).exit_code == 143


def test_an_error_is_an_annotation_where_github_reads_it(pair, capfd, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, _, err = run(capfd, pair.command("--rank", "0"))
    assert code == 2
    assert err.startswith("::error::rank is 0")


def test_a_traceback_is_shown_only_when_asked_for(pair, monkeypatch):
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    with pytest.raises(errors.UsageError):
        main(pair.command("--rank", "0"))


@pytest.mark.parametrize(
    "name", ["with space", "line\nbreak", "Größe", b"al\xff".decode("utf-8", "surrogateescape")]
)
def test_a_folder_of_any_name_is_edited(pair, capfd, name):
    folder = pair.aligned.rename(pair.aligned.with_name(name))
    code, _, err = run(capfd, ["lox", pair.base, folder, "--rank", "3", "-o", pair.out])
    assert code == 0, err


# Real processes.


def without_override():
    """Give up root's privilege to read and write everything; a plain user has none to give up."""
    import ctypes

    if os.geteuid() == 0:
        for capability in (1, 2):
            if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):
                raise OSError("the capability could not be dropped")


def process(arguments, **more):
    environment = {key: value for key, value in os.environ.items() if key != "GITHUB_ACTIONS"}
    command = [sys.executable, "-m", "surgery", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False, **more
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_missing_right_is_exit_5_in_a_real_process(pair, what):
    place = pair.aligned / SHARD if what == "read" else pair.root
    mode = place.stat().st_mode
    place.chmod(0 if what == "read" else 0o555)
    try:
        done = process(pair.command("-q"), preexec_fn=without_override)
    finally:
        place.chmod(mode)
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    check_message(done.stderr, ["right to read"])
    assert sorted(path.name for path in pair.root.iterdir()) == ["in"]


@pytest.mark.slow
def test_a_limit_on_file_sizes_met_half_way_is_a_full_disk(pair):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    done = process(pair.command("-q"), preexec_fn=limit)
    assert done.returncode == 4, done.stderr
    check_message(done.stderr, ["out", "run the same command again"])
    assert not pair.out.exists()
    assert process(pair.command("-q")).returncode == 0
