"""Several real processes at one run: the same bytes, whatever their number and whatever becomes of them."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery.testing import tiny_pair

FILES = ("surgery.json", "surgery.tensors.jsonl")


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(folder, size, output="out", *, extra=(), slow=()):
    """`size` processes as a launcher starts them; those in `slow` wait after each tensor until they are killed."""
    port = free_port()
    processes = []
    for rank in range(size):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        program = SLOW if rank in slow else "from surgery.cli.app import main; main()"
        command = ["lox", "base", "aligned", "--rank", "3", "-o", output, *extra]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *command],
                cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return processes


SLOW = """
import time
from surgery import shards
from surgery.cli.app import main
write = shards._write_tensor
def waiting(*arguments):
    time.sleep(60)
    return write(*arguments)
shards._write_tensor = waiting
main()
"""


def finish(processes, timeout=120):
    """Exit codes, stdout and stderr of all."""
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


def digests(output: Path):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.iterdir())
        if path.suffix == ".safetensors" or path.name in FILES
    }


@pytest.fixture
def folder(tmp_path):
    tiny_pair(tmp_path, shard_size="20KB")
    assert len(list((tmp_path / "aligned").glob("*.safetensors"))) >= 4
    return tmp_path


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(folder):
    found = {}
    for size in (1, 2, 3):
        ended = finish(start(folder, size, f"out{size}"))
        assert [code for code, _, _ in ended] == [0] * size, ended
        # Only the first speaks.
        assert "edited" in ended[0][1]
        assert all((out, err) == ("", "") for _, out, err in ended[1:])
        found[size] = digests(folder / f"out{size}")
        assert not list(folder.glob("out*.partial"))
        assert not list((folder / f"out{size}").glob("journal*"))
    assert found[1] == found[2] == found[3]
    ended = finish(start(folder, 2, "other", extra=("--alpha", "2")))
    assert ended[0][0] == 0
    assert digests(folder / "other") != found[1]


@pytest.mark.slow
def test_every_process_writes_a_share(folder):
    processes = start(folder, 2, slow=(0,))
    journal = folder / "out.partial" / "journal-1.jsonl"
    try:
        for _ in range(600):
            if journal.exists() and '"shard"' in journal.read_text():
                break
            time.sleep(0.1)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert any("shard" in line for line in lines)
        assert '"shard"' not in journal.with_name("journal.jsonl").read_text()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_fails_the_run_and_a_rerun_with_any_number_resumes(folder, victim):
    assert finish(start(folder, 1, "whole"))[0][0] == 0
    processes = start(folder, 2, slow=(victim,))
    other = folder / "out.partial" / ("journal.jsonl" if victim else "journal-1.jsonl")
    for _ in range(600):
        if other.exists() and '"shard"' in other.read_text():
            break
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    ended = finish(processes)
    code, out, err = ended[1 - victim]
    assert code == 4
    assert out == ""
    if victim:
        assert "another process of this run ended" in err
        assert "run the same command again" in err
        assert "Traceback" not in err
    assert not (folder / "out").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (folder / "out.partial").glob("*.safetensors")}
    kept = {json.loads(line)["shard"] for line in other.read_text().splitlines() if '"shard"' in line}
    assert kept
    ended = finish(start(folder, 3))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert digests(folder / "out") == digests(folder / "whole")
    assert all((folder / "out" / name).stat().st_mtime_ns == written[name] for name in kept)


@pytest.mark.slow
def test_bad_input_is_told_once_and_ends_all_processes_with_its_code(folder):
    (folder / "out").mkdir()
    (folder / "out" / "precious").write_text("mine")
    ended = finish(start(folder, 2))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "out exists" in ended[0][2]
    assert ended[1][2] == ""
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["precious"]


@pytest.mark.slow
def test_an_adapter_is_refused(folder):
    ended = finish(start(folder, 2, extra=("--as-lora",)))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "one process" in ended[0][2]


@pytest.mark.slow
def test_accelerate_launches_it(folder):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", str(free_port()),
        "-m", "surgery", "lox", "base", "aligned", "--rank", "3", "-o", "out",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "edited" in done.stdout
    assert finish(start(folder, 1, "alone"))[0][0] == 0
    assert digests(folder / "out") == digests(folder / "alone")
