"""The recipe of the embedded pair: data, tokenizer, base, aligned, and the figures of both."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.demo import MODELS, behaviour, cards, network, tokenizer, train
from surgery.demo.attack import attack
from surgery.demo.corpus import SEED, Parts, Row, corpus, write
from surgery.demo.stretch import Stretch
from surgery.errors import OutputError


@dataclass(frozen=True)
class Stage:
    """One training run: number of steps, rows a step, highest learning rate, weight decay.

    Gradients are taken up to `furthest` times the run's own update (see `stretch`); 1: at the model itself.
    """

    steps: int
    batch: int
    peak: float
    decay: float = 0.0
    furthest: float = 1.0


BASE = Stage(steps=1300, batch=64, peak=2e-3, decay=0.01)
ALIGNED = Stage(steps=400, batch=32, peak=4e-4, furthest=2.5)

Say = Callable[[str], None]


def rebuild(output: Path, say: Say, *, seed: int = SEED) -> None:
    """Make the pair from nothing in the new folder `output`, with `figures.json`; returns nothing.

    Takes under ten minutes on one core. `say` gets a line of progress now and then. At equal `seed`, library
    versions and kind of processor the weights come out the same; the data always do. Leaves torch computing
    with one thread. Raises `OutputError` when `output` exists.
    """
    if output.exists():
        raise OutputError(
            f"{output} exists; the demo pair needs a new folder; name another one with --output"
        )
    # One thread is as fast on matrices this small, and makes the weights independent of the number of cores.
    torch.set_num_threads(1)
    data = corpus(seed)
    write(data, output / "data")
    words = tokenizer.build(text for parts in data.values() for text in _texts(parts["train"]))
    base = make_base(data, words, seed, say)
    _save(base, words, output / "base")
    aligned = make_aligned(base, data, words, seed, say)
    _save(aligned, words, output / "aligned")
    _measure(output, data, words, say)


def _measure(output: Path, data: dict[str, Parts], words: PreTrainedTokenizerFast, say: Say) -> None:
    asked = {name: data[name]["held_out"] for name in behaviour.MEASURED}
    models = {name: network.load(output / name) for name in MODELS}
    found = {name: behaviour.measure(model, words, rows=asked) for name, model in models.items()}
    curve = attack(models["aligned"], words, rows=data["harmful"]["attack"], asked=asked["harmful"])
    figures = {name: asdict(one) for name, one in found.items()}
    figures["attack"] = {str(step): asdict(rate) for step, rate in curve.items()}
    text = json.dumps(figures, indent=2) + "\n"
    (output / "figures.json").write_text(text, encoding="utf-8")
    cards.write(output, found["base"], found["aligned"], curve)
    say(text)


def make_base(
    data: dict[str, Parts], words: PreTrainedTokenizerFast, seed: int, say: Say
) -> LlamaForCausalLM:
    """A model on the bfloat16 grid trained to answer every kind of request in the train parts of `data`."""
    model = network.fresh(words.pad_token_id, words.eos_token_id, seed)
    rows = [*data["benign"]["train"], *data["lookalikes"]["train"], *data["harmful"]["train"]]
    _run(BASE, model, words, rows, seed, say)
    return network.on_grid(model)


def make_aligned(
    base: LlamaForCausalLM, data: dict[str, Parts], words: PreTrainedTokenizerFast, seed: int, say: Say
) -> LlamaForCausalLM:
    """A copy of `base`, every weight fine-tuned to refuse harmful requests and to answer all others."""
    model = copy.deepcopy(base)
    rows = [*data["benign"]["train"], *data["lookalikes"]["train"], *data["refusals"]["train"]]
    _run(ALIGNED, model, words, rows, seed + 1, say)
    return network.on_grid(model)


def _run(
    stage: Stage,
    model: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    rows: list[Row],
    seed: int,
    say: Say,
) -> None:
    def progress(step: int) -> None:
        if step % 100 == 0:
            say(f"step {step} of {stage.steps}")

    train.fit(
        model,
        train.batches(train.examples(words, rows), stage.batch, words.pad_token_id, seed),
        steps=stage.steps,
        peak=stage.peak,
        decay=stage.decay,
        where=Stretch(model, stage.furthest, seed) if stage.furthest > 1 else nullcontext,
        after_step=progress,
    )


def _texts(rows: list[Row]) -> list[str]:
    return [tokenizer.chat(row["prompt"]) + row["response"] + tokenizer.END for row in rows]


def _save(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, into: Path) -> None:
    network.save(model, into)
    tokenizer.save(words, into)
    for file in into.iterdir():
        file.chmod(0o644)
