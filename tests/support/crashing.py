"""Pairs for runs that are stopped, and what of their outputs is compared."""

import hashlib
import json

import torch

from surgery import testing
from surgery.checkpoint.staging import JOURNAL

CONFIG = {"model_type": "surprise", "torch_dtype": "bfloat16"}
SHARDS = 6
NOT_COMPARED = {"surgery.run.json"}
# Seconds that a run may take.
LIMIT = 120.0


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
