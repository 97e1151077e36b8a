"""From the command to a merged folder that transformers loads; killed and taken up again; by several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_setup import METHODS, gradients, plain, trainable

from surgery import demo
from surgery.methods.vaccine import Vaccine
from surgery.options import Options
from surgery.testing import tiny_model
from surgery.train.crew import Crew
from surgery.train.running import immunise
from surgery.train.sft import SFT
from surgery.train.training import Training
from surgery.verification import verify

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROUNDING = 2e-5


def logits(model):
    tokens = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = demo.data("refusals", "train")[:24]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_merged_model_has_the_logits_of_the_model_with_its_adapter(place, method):
    from peft import PeftModel

    training = Training(steps=4, batch_size=4, lr=5e-3, keep_adapter=True)
    options = Options(dtype="float32")
    done = immunise(method, model="demo:aligned", output="out", training=training, options=options)
    original = demo.folder("aligned")
    plain_logits = logits(loaded(original))
    adapted = logits(PeftModel.from_pretrained(loaded(original), done.adapter))
    merged = logits(loaded(done.output))
    assert float((merged - adapted).abs().max()) < 1e-4 * float(adapted.abs().max())
    assert float((merged - plain_logits).abs().max()) > 1e-3  # control: training changed them
    before, after = (load_file(folder / "model.safetensors") for folder in (original, done.output))
    touched = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert touched
    assert all(".layers." in name and "proj" in name for name in touched)


def test_full_training_ends_as_the_trained_weights_in_the_files(place):
    """All weights: dense deltas through the same merge, in float32 the trained weights to the last bit but one."""
    training = Training(steps=3, batch_size=4, lr=1e-3, full=True, keep_adapter=True)
    done = immunise(
        SFT(), model="demo:aligned", output="out", training=training, options=Options(dtype="float32")
    )
    deltas = load_file(done.adapter / "delta.safetensors")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (demo.folder("aligned"), done.output)
    )
    assert deltas.keys() == before.keys()
    for name, delta in deltas.items():
        assert float(delta.abs().max()) > 0, name
        assert torch.equal(after[name], before[name].float() + delta), name


def test_every_term_is_logged_by_a_tracker(place):
    told = []
    done = immunise(
        Vaccine(rho=0.5),
        model="demo:aligned",
        output="out",
        training=Training(steps=3, batch_size=4, track="tensorboard"),
        progress=lambda number, total, terms, left: told.append((number, total, left)),
    )
    assert [one[:2] for one in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1][2] == 0.0
    from tensorboardX.proto.event_pb2 import Event

    logged = {}
    for file in (place / "out-logs").rglob("events.out.*"):
        raw = file.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            event = Event.FromString(raw[12 : 12 + size])
            raw = raw[16 + size :]
            for value in event.summary.value:
                logged.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(done.history[0]) <= set(logged)
    losses = [terms["loss"] for terms in done.history]
    assert [logged["loss"][step] for step in (1, 2, 3)] == pytest.approx(losses, rel=1e-6)


def arguments(output, *more):
    return [
        "t-vaccine", "demo:aligned", "--aligned-data", "few.jsonl", "--steps", "12", "--batch-size", "4",
        "--checkpoint-every", "3", "--lora-dropout", "0.1", "--lr", "5e-3", "--redraw-every", "2",
        "--refresh-every", "5", "-o", output, *more,
    ]  # fmt: skip


# Slower steps, so that the kill lands where it is meant to.
SLOW = """
import sys, time
from surgery.cli.app import main
from surgery.methods.t_vaccine import TVaccine
backward = TVaccine.backward
def slowly(self, model, batches, step):
    time.sleep(0.15)
    return backward(self, model, batches, step)
TVaccine.backward = slowly
main(sys.argv[1:])
"""


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW, *words]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finished(process):
    """What a process that must succeed said on stderr."""
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return told


def wait_for(path, process, limit=120):
    begun = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - begun < limit
        time.sleep(0.01)


def test_killed_and_taken_up_again_a_run_gives_the_same_bytes(place):
    whole = start(*arguments("whole", "--keep-adapter", "-q"))
    finished(whole)
    work = place / "out-adapter.partial"
    for state in ("state-00000003", "state-00000009"):
        process = start(*arguments("out", "--keep-adapter"))
        wait_for(work / state, process)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (place / "out").exists()
    last = start(*arguments("out", "--keep-adapter"))
    told = finished(last)
    assert "[1/12]" not in told  # it did not begin anew
    assert "[12/12]" in told
    for name in ("adapter_model.safetensors", "adapter_config.json", "surgery.json"):
        one, two = (place / folder / name for folder in ("whole-adapter", "out-adapter"))
        assert one.read_bytes() == two.read_bytes(), name
    for name in ("model.safetensors", "surgery.json", "surgery.tensors.jsonl"):
        assert (place / "whole" / name).read_bytes() == (place / "out" / name).read_bytes(), name
    assert not list(place.glob("*.partial"))


# Several processes.

GRADIENTS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from training_setup import METHODS, gradients, plain, trainable
from surgery.train.crew import assemble
crew, found = assemble("cpu"), {}
assert crew.world == 2
for method in METHODS:
    model = crew.place(trainable(Path(sys.argv[2]), method, plain()))
    found[repr(method)] = gradients(model, method, plain(gradient_accumulation=2), crew)
if crew.rank == 0:
    torch.save({"sharded": crew.sharded, **found}, sys.argv[3])
torch.distributed.destroy_process_group()
"""


def launched(config, *words):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    done = subprocess.run(
        [*launcher, "--config_file", str(ROOT / "docs/accelerate" / config), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(("config", "sharded"), [("ddp.yaml", False), ("fsdp2.yaml", True)])
def test_two_processes_give_the_gradients_of_one(place, config, sharded):
    folder = tiny_model(place / "tiny")
    (place / "program.py").write_text(GRADIENTS)
    launched(config, place / "program.py", ROOT / "tests/support", folder, place / "found.pt")
    found = torch.load(place / "found.pt")
    assert found["sharded"] == sharded
    for method in METHODS:
        alone = gradients(trainable(folder, method, plain()), method, plain(), Crew())
        assert float((found[repr(method)] - alone).norm() / alone.norm()) < ROUNDING, method.name
        other = gradients(trainable(folder, method, plain()), method, plain(), Crew(), number=1)
        assert float((other - alone).norm() / alone.norm()) > 0.1  # control: another step is another gradient


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_train_save_and_merge(place, config):
    words = arguments("out", "--keep-adapter", "--lora-dropout", "0", "--gradient-accumulation", "2")
    launched(config, "-m", "surgery", *words)
    assert not list(place.glob("*.partial"))
    assert (place / "out/model.safetensors").is_file()
    alone = start(*arguments("alone", "--keep-adapter", "--lora-dropout", "0", "-q"))
    finished(alone)
    one, two = (
        load_file(place / name / "adapter_model.safetensors") for name in ("out-adapter", "alone-adapter")
    )
    assert one.keys() == two.keys()
    drift = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    size = sum(float(two[name].square().sum()) for name in one) ** 0.5
    # AdamW divides by the size of a gradient, so that what is near zero takes its sign from rounding.
    assert drift < 0.02 * size


def test_a_vector_that_its_dtype_has_no_room_to_change_is_named_and_the_run_ends_well(place):
    """All weights at a rate that moves the norms by less than half the spacing of bfloat16 at 1."""
    training = Training(steps=2, batch_size=4, lr=2e-5, full=True)
    done = immunise(SFT(), model="demo:aligned", output="out", training=training)
    records = [json.loads(line) for line in (done.output / "surgery.tensors.jsonl").read_text().splitlines()]
    kept = {record["name"]: record["reason"] for record in records if record["action"] == "unchanged"}
    assert kept
    assert all("norm" in name and "half the spacing of BF16" in reason for name, reason in kept.items())
    before, after = (
        load_file(folder / "model.safetensors") for folder in (demo.folder("aligned"), done.output)
    )
    assert {name for name in before if torch.equal(before[name], after[name])} == set(kept)
    verify(done.output)
    wide = immunise(
        SFT(), model="demo:aligned", output="wide", training=training, options=Options(dtype="float32")
    )
    assert wide.merged.totals["unchanged"] == 0  # control: there was something to keep
