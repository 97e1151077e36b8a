"""The real pair and what the command made of it, built at most once in a session."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
NO_PACKAGE = 3


class Weights:
    """The tensors of a safetensors folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as handle:
                self.files |= dict.fromkeys(handle.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two sides of an edit."""

    base: Weights
    aligned: Weights


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of the command left: its output, its JSON and its figures per tensor."""

    output: Weights
    report: dict[str, Any]
    records: dict[str, dict[str, Any]]


def surgery(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Return the finished command."""
    command = [sys.executable, "-m", "surgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build(*arguments: str) -> dict[str, Any]:
    """Return what `benchmarks.real_pair` prints; skip where weights cannot be had and nobody insisted on them."""
    # A process of its own: training leaves gigabytes behind in the allocator.
    command = [sys.executable, "-m", "benchmarks.real_pair", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == NO_PACKAGE and not os.environ.get("SURGERY_REAL_REQUIRED"):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        pytest.fail(f"real_pair {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    folders: dict[str, Any] = json.loads(done.stdout)
    return folders


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    """The pairs short enough for every run: by full fine-tuning, and by a merged LoRA."""
    folders = build("short", "adapter")
    base = Weights(Path(folders["base"]))
    return {name: Pair(base, Weights(Path(folders[name]))) for name in ("short", "adapter")}


@pytest.fixture(scope="session")
def long_pair() -> Pair:
    """The pair that was trained until it refuses."""
    folders = build("long")
    return Pair(Weights(Path(folders["base"])), Weights(Path(folders["long"])))


@pytest.fixture(scope="session")
def refusals() -> Callable[..., tuple[list[dict[str, float]], bool]]:
    """`refusals(*folders)`: shares of held-out prompts refused, and whether these are the public ones."""

    def measured(*folders: Path) -> tuple[list[dict[str, float]], bool]:
        built = build("--measure", *map(str, folders))
        return [built["refused"][str(folder)] for folder in folders], built["public_prompts"]

    return measured


@pytest.fixture(scope="session")
def lox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """`lox(pair, *options)`: the run with rank 6 and alpha 1.5, made once for each pair and options."""
    root = tmp_path_factory.mktemp("lox")
    runs: dict[tuple[object, ...], Run] = {}

    def run(pair: Pair, *options: str) -> Run:
        key = (pair.aligned.folder, *options)
        if key not in runs:
            runs[key] = _run(pair, root / f"out{len(runs)}", options)
        return runs[key]

    yield run
    shutil.rmtree(root)


def _run(pair: Pair, out: Path, options: tuple[str, ...]) -> Run:
    sides = (pair.base.folder, pair.aligned.folder)
    done = surgery("lox", *sides, "--rank", 6, "--alpha", 1.5, "-o", out, "--json", *options)
    if done.returncode:
        pytest.fail(f"surgery lox ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = (out / "surgery.tensors.jsonl").read_text().splitlines()
    records = {row["name"]: row for row in map(json.loads, lines)}
    return Run(Weights(out), json.loads(done.stdout), records)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, for runs that are expected to fail."""
    return surgery
