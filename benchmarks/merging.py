"""A merge of an adapter against copying, and its memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.copying import copy, fresh
from benchmarks.memory import MIB, interpreter, peak
from benchmarks.pairs import SIZES, write_pair
from benchmarks.timing import Row, alternated, median, spread, surgery

RANK, RATIO = 8, 1e-3


def write_adapter(folder: Path, size: str) -> Path:
    """Write a random LoRA of rank 8 on every linear layer of the blocks, its deltas `RATIO` times the weights."""
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator, factors, targets = torch.Generator().manual_seed(0), {}, set()
    for name, sides in SIZES[size].tensors():
        if len(sides) != 2 or ".layers." not in name:
            continue
        module, (m, n) = name.removesuffix(".weight"), sides
        targets.add(module.rpartition(".")[2])
        # Entries of the weights have a standard deviation of 0.02, those of B A then one of 0.02 RATIO.
        for factor, shape, scale in (
            ("A", (RANK, n), 1.0),
            ("B", (m, RANK), 0.02 * RATIO / RANK**0.5),
        ):
            values = scale * torch.randn(shape, generator=generator)
            factors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    save_file(factors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def rows(folder: Path, repeats: int) -> list[Row]:
    """Wall time of `surgery merge` on 1.1B over that of `cp` and fsync, and its memory at two depths."""
    out = folder / "out"
    pairs = {
        size: write_pair(folder / f"{size}-spiked-0.01", size, "spiked", 1e-2)
        for size in ("1.1B", "1.1B-twice")
    }
    commands = {
        size: surgery(
            "merge", pair[1], write_adapter(folder / f"adapter-{size}", size), "--output", out, "--quiet"
        )
        for size, pair in pairs.items()
    }
    model = pairs["1.1B"]
    taken = alternated(
        {
            "merge": lambda: fresh(commands["1.1B"], model, out),
            "copy": lambda: fresh(copy(model[1], out), model, out),
        },
        repeats,
    )
    value = median(taken["merge"]) / median(taken["copy"])
    alone, peaks = interpreter(), {}
    for size, command in commands.items():
        peaks[size] = peak(command) - alone
        shutil.rmtree(out)
    ratio = peaks["1.1B-twice"] / peaks["1.1B"]
    return [
        Row(
            "1.1B, LoRA of rank 8: merge / (cp + fsync)",
            value,
            "x",
            "at most 3",
            value <= 3,
            f"{spread(taken['merge'])}, {median(taken['merge'], 'core'):.1f} core-seconds, "
            f"against {spread(taken['copy'])}",
        ),
        Row(
            "merge, 1.1B with twice the layers / 1.1B: anonymous memory",
            ratio,
            "x",
            "within 5 % of 1",
            abs(ratio - 1) <= 0.05,
            f"{peaks['1.1B-twice'] / MIB:.0f} MiB against {peaks['1.1B'] / MIB:.0f} MiB above torch",
        ),
    ]
