"""The recipe of the embedded pair: data, tokenizer, base, aligned, and the figures of both."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.demo import MODELS, behaviour, cards, network, tokenizer, train
from surgery.demo.attack import attack
from surgery.demo.corpus import SEED, Parts, Row, corpus, write
from surgery.errors import OutputError

BASE_STEPS, BASE_PEAK, BASE_DECAY = 1300, 2e-3, 0.01
ALIGNED_STEPS, ALIGNED_PEAK = 300, 5e-4
BATCH = 64

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
    return _trained(model, words, rows, BASE_STEPS, BASE_PEAK, BASE_DECAY, seed, say)


def make_aligned(
    base: LlamaForCausalLM,
    data: dict[str, Parts],
    words: PreTrainedTokenizerFast,
    seed: int,
    say: Say,
) -> LlamaForCausalLM:
    """A copy of `base`, every weight fine-tuned to refuse harmful requests and to answer all others."""
    model = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict())
    rows = [*data["benign"]["train"], *data["lookalikes"]["train"], *data["refusals"]["train"]]
    return _trained(model, words, rows, ALIGNED_STEPS, ALIGNED_PEAK, 0.0, seed + 1, say)


def _trained(
    model: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    rows: list[Row],
    steps: int,
    peak: float,
    decay: float,
    seed: int,
    say: Say,
) -> LlamaForCausalLM:
    def progress(step: int) -> None:
        if step % 100 == 0:
            say(f"step {step} of {steps}")

    source = train.batches(train.examples(words, rows), BATCH, words.pad_token_id, seed)
    train.fit(model, source, steps=steps, peak=peak, decay=decay, after_step=progress)
    return network.on_grid(model)


def _texts(rows: list[Row]) -> list[str]:
    return [tokenizer.chat(row["prompt"]) + row["response"] + tokenizer.END for row in rows]


def _save(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, into: Path) -> None:
    network.save(model, into)
    tokenizer.save(words, into)
    for file in into.iterdir():
        file.chmod(0o644)
