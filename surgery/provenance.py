"""What was done to which bytes: the manifest, the per-tensor figures and the account of the run.

`surgery.json` and `surgery.tensors.jsonl` are the same for the same inputs, options, versions and number of
threads: they hold no time and no place. What differs from run to run stands in `surgery.run.json`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery import __version__
from surgery.checkpoint.staging import MANIFEST
from surgery.editing import Record, compute_device
from surgery.hub import Source
from surgery.kernels import backend
from surgery.methods.base import WeightEdit
from surgery.options import Options

if TYPE_CHECKING:
    from surgery.job import Job

SCHEMA = 1
RUN = "surgery.run.json"
TENSORS = "surgery.tensors.jsonl"

# What decides how a run behaves but not what it computes: it stays out of the manifest.
_NOT_RECORDED = ("overwrite", "allow_pickle", "i_checked_the_order", "device", "memory_limit", "stream")


def option_values(method: WeightEdit, options: Options) -> dict[str, Any]:
    """Every option of a weight edit that decides the output's bytes, by name."""
    return {**dataclasses.asdict(method), **run_values(options)}


def run_values(options: Options) -> dict[str, Any]:
    """The options of a run that decide the output's bytes, by name."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key not in _NOT_RECORDED}


def versions() -> dict[str, str]:
    """Versions of what computed the output."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    return {"surgery": __version__, "python": platform.python_version(), **packages}


def totals(records: Iterable[Record]) -> dict[str, Any]:
    """Figures over all tensors of an output, in which at least one is edited.

    energy_kept and retention are weighted by energy (sums of squares), noise_to_edit is a ratio of Frobenius
    norms, certified_error_max is the worst tensor's bound. An edit of zero (alpha 0) is retained whole. Figures of
    a decomposition are there only where one was made.
    """
    records = list(records)
    edited = [record for record in records if record["action"] == "edit"]
    edit = math.fsum(record["edit_norm"] ** 2 for record in edited)
    noise = math.fsum((record["noise"] * record["edit_norm"]) ** 2 for record in edited)
    return {
        "edited": len(edited),
        "copied": sum(record["action"] == "copy" for record in records),
        "unchanged": sum(record["action"] == "unchanged" for record in records),
        "retention": _weighted(edited, "retention", "edit_norm"),
        "retention_min": min(record["retention"] for record in edited),
        "noise_to_edit": math.sqrt(noise / edit) if edit else 0.0,
        "noise_spectral_max": max(record["noise_spectral"] for record in edited),
        **(_certified(edited) if "certified_error" in edited[0] else {}),
    }


def _certified(edited: list[Record]) -> dict[str, Any]:
    """What the decompositions kept, and how certainly."""
    return {
        "energy_kept": _weighted(edited, "energy_kept", "delta_norm"),
        "certified_error_max": max(record["certified_error"] for record in edited),
        "certified_by": {
            name: sum(record["criterion"] == name for record in edited)
            for name in ("subspace", "energy", "exact")
        },
        "energy_deficit_max": max(record["energy_deficit"] for record in edited),
    }


def _weighted(records: list[Record], value: str, norm: str) -> float:
    """The mean of a figure, weighted by the square of a norm; 1 where all norms are 0."""
    total = math.fsum(record[norm] ** 2 for record in records)
    return math.fsum(record[value] * record[norm] ** 2 for record in records) / total if total else 1.0


def tensors_bytes(records: Iterable[Record]) -> bytes:
    """One JSON object per line and tensor, in the order of the files."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output; ValueError or OSError where there is none."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{MANIFEST} is not a JSON object")
    return document


def _input(source: Source, files: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"source": source.label, "repository": source.repository, "commit": source.commit}
    manifest = source.folder / MANIFEST
    if manifest.is_file():
        # The parent was made by surgery too: its manifest is not carried, but linked by its hash.
        entry["ancestor"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return {**entry, "files": files}


def manifest(
    job: "Job",
    input_files: Mapping[str, Mapping[str, Any]],
    records: Iterable[Record],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest: equation, inputs, options, versions, totals and the hash of every output file."""
    records, plan = list(records), job.plan
    return {
        "schema": SCHEMA,
        **job.identity(),
        "equation": plan.equation,
        "equivalent": plan.equivalent,
        "inputs": {role: _input(source, input_files[role]) for role, source in job.sources.items()},
        "roles": plan.roles.summary(),
        "order_overruled": bool(plan.roles.contradicts),
        "notes": list(plan.notes),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "backends": backend.recorded(compute_device(job.options)),
        "totals": totals(records),
        "unchanged": [record["name"] for record in records if record["action"] == "unchanged"],
        "files": dict(sorted(files.items())),
    }


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as it is stored."""
    return json.dumps(document, indent=2).encode() + b"\n"
