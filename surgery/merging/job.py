"""A planned merge: one checkpoint, the deltas of adapters by tensor name, nothing written yet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from surgery import memory, provenance, resources, workers
from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.quantised import refuse_quantised
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.sidecars import list_sidecars
from surgery.editing import compute_device
from surgery.errors import UsageError
from surgery.hub import Source, Weights, resolve, resolve_adapter
from surgery.hub.remote import open_source
from surgery.job import Job, cast_note, default_output, model_size, refuse_paths
from surgery.merging.adapter import Adapter, joined, read_adapter
from surgery.merging.config import CONFIG
from surgery.merging.deltas import rank_of
from surgery.merging.editor import MergeEditor, workspace
from surgery.merging.landing import Added, Lora, Part, land
from surgery.options import Options
from surgery.order import Roles
from surgery.plan import Plan, Step, output_dtype, seconds_estimate

MERGE = "merge"
MODEL = "model"
PAPER = "https://arxiv.org/abs/2106.09685"

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class MergeJob(Job):
    """A merge of adapters into a model.

    Attributes:
        adapters: What is merged.
        weights: What each adapter's deltas are multiplied by.
        parts: What each edited tensor gets, by its name.
        trained: How the adapter was trained, by the method that did it; None for adapters from elsewhere.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    parts: Mapping[str, tuple[Part, ...]]
    trained: Mapping[str, Any] | None = None

    edited = MODEL

    @cached_property
    def _joined(self) -> Checkpoint:
        return joined(self.adapters)

    @property
    def base(self) -> Checkpoint:
        """The tensors of all adapters."""
        return self._joined

    @property
    def name(self) -> str:
        """The method that trained the adapter, or merge."""
        return str(self.trained["method"]) if self.trained else MERGE

    def identity(self) -> dict[str, Any]:
        """The method, its paper, how it was trained, and the options of the merge."""
        options = {"weights": list(self.weights), **provenance.run_values(self.options)}
        paper = self.trained.get("paper", PAPER) if self.trained else PAPER
        settings = {
            _role(adapter.number): adapter.settings.sha256 for adapter in self.adapters if adapter.settings
        }
        trained = {"trained": dict(self.trained)} if self.trained else {}
        return {"method": self.name, "paper": paper, "options": options, "settings": settings, **trained}

    def beside(self, role: str) -> tuple[str, ...]:
        """Side files of the model, and the configs of adapters."""
        if role == MODEL:
            return self.plan.sidecars.carried
        adapter = self.adapters[list(self.checkpoints).index(role) - 1]
        return (CONFIG,) if adapter.settings else ()

    def editor(self, aligned: Reader, base: Reader) -> MergeEditor:
        """The deltas at work on the model."""
        return MergeEditor(self.parts, self.options, aligned, base)

    def inputs_of(self, shard: Shard) -> Iterator[tuple[str, Shard]]:
        """The shard, and every adapter."""
        yield MODEL, shard
        for role, checkpoint in self.checkpoints.items():
            if role != MODEL:
                yield from ((role, other) for other in checkpoint.shards)

    def nothing_changed(self) -> str:
        """All deltas are zero."""
        return (
            f"{' and '.join(adapter.label for adapter in self.adapters)} would change nothing: every delta is zero, "
            "as before any training; give an adapter that was trained"
        )


def prepare(
    model: str | Path,
    adapters: Sources,
    *,
    weights: Sequence[float] = (),
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    trained: Mapping[str, Any] | None = None,
) -> MergeJob:
    """Resolve, read headers and plan a merge; nothing is written and no tensor data is read.

    Args: as for `surgery.merge`.

    Raises:
        SurgeryError: Anything that would keep the merge from succeeding, as far as headers tell.
    """
    # One thread a tensor and several tensors at once, as for every edit.
    torch.set_num_threads(1)
    named = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    factors = _weights(weights, len(named))
    _refuse_options(named, options)
    sources = _sources(model, named, options)
    compute_device(options)
    label = str(trained["method"]) if trained else "merged"
    target = Path(output) if output is not None else default_output(sources[MODEL], label)
    refuse_paths(sources, target)
    checkpoint = open_source(sources[MODEL], allow_pickle=options.allow_pickle)
    refuse_quantised(checkpoint)
    read = tuple(
        read_adapter(source, number)
        for number, source in enumerate(source for role, source in sources.items() if role != MODEL)
    )
    parts = land(checkpoint, read, factors)
    checkpoints = {MODEL: checkpoint, **{_role(adapter.number): adapter.files for adapter in read}}
    plan = _plan(checkpoint, read, factors, parts, sources[MODEL], target, options, trained)
    return MergeJob(options, sources, checkpoints, plan, target, read, factors, parts, trained)


def _role(number: int) -> str:
    return f"adapter-{number + 1}" if number else "adapter"


def _weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """One weight for each adapter, 1 by default."""
    if weights and len(weights) != count:
        raise UsageError(
            f"there are {len(weights)} --weight and {count} adapters; give one for each, or none"
        )
    if wrong := [weight for weight in weights if not math.isfinite(weight) or weight == 0]:
        raise UsageError(f"--weight is {wrong[0]}; it must be a finite number other than 0")
    return tuple(float(weight) for weight in weights) or (1.0,) * count


def _refuse_options(named: Sequence[str | Path], options: Options) -> None:
    if not named:
        raise UsageError("there is no adapter to merge; give the folder of one, or ORG/NAME")
    if options.as_lora:
        raise UsageError("a merge writes a model, not an adapter; leave out --as-lora")


def _sources(model: str | Path, adapters: Sequence[str | Path], options: Options) -> dict[str, Source]:
    weights: Weights = "stream" if options.stream else "defer"
    found = {MODEL: resolve(model, allow_pickle=options.allow_pickle, weights=weights)}
    return found | {_role(number): resolve_adapter(named) for number, named in enumerate(adapters)}


def _plan(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    parts: Mapping[str, tuple[Part, ...]],
    source: Source,
    output: Path,
    options: Options,
    trained: Mapping[str, Any] | None,
) -> Plan:
    steps = {
        info.name: _step(checkpoint, info.name, parts.get(info.name, ()), options)
        for shard in checkpoint.shards
        for info in shard.header.tensors
    }
    sidecars, files = list_sidecars(checkpoint), joined(adapters)
    read = checkpoint.total_bytes + files.total_bytes
    written = model_size(checkpoint, steps, sidecars)
    return Plan(
        steps=steps,
        equation=_equation(adapters, weights, trained) + ("" if trained else _numbers(parts)),
        equivalent="",
        notes=(*checkpoint.notes, *cast_note(options)),
        roles=_roles(source, adapters, trained),
        sidecars=sidecars,
        bytes_read=read,
        bytes_written=written,
        memory_bytes=memory.estimate(steps, checkpoint, files, options.memory_limit),
        seconds_estimate=seconds_estimate(steps, read + written, workers.count()),
        disk_free=resources.disk_free(output),
    )


def _step(checkpoint: Checkpoint, name: str, parts: Sequence[Part], options: Options) -> Step:
    """What happens to one tensor of the model."""
    info = checkpoint.tensors[name]
    dtype = output_dtype(info, options.dtype)
    if not parts:
        return Step(name, "copy", "no adapter changes it", info.shape, dtype)
    rank = rank_of(parts, info.shape) if len(info.shape) >= 2 else None
    reason = ", ".join(_reason(part) for part in parts)
    extra = workspace(parts, info.shape, dtype)
    return Step(name, "edit", reason, info.shape, dtype, rank, workspace=extra)


def _reason(part: Part) -> str:
    if isinstance(part, Lora):
        return f"{'DoRA' if part.magnitude else 'LoRA'} of rank {part.rank} in {part.label}"
    return f"delta in {part.label}" if isinstance(part, Added) else f"replaced by {part.label}"


def _equation(
    adapters: Sequence[Adapter], weights: Sequence[float], trained: Mapping[str, Any] | None
) -> str:
    """What is computed, with numbers."""
    if trained and trained.get("equation"):
        return str(trained["equation"])
    terms = []
    for adapter, weight in zip(adapters, weights, strict=True):
        factor = "" if weight == 1.0 else f"{weight:g} "
        number = f"_{adapter.number + 1}" if len(adapters) > 1 else ""
        delta = f"s{number} B{number} A{number}" if adapter.settings else f"delta{number}"
        terms.append(f"{factor}{delta}")
    scaled = any(module.magnitude for adapter in adapters for module in adapter.modules)
    total = f"W + {' + '.join(terms)}"
    return f"W' = m ({total}) / ||{total}||" if scaled else f"W' = {total}"


def _numbers(parts: Mapping[str, tuple[Part, ...]]) -> str:
    """Rank and scaling where they are the same for all tensors."""
    found = {(part.rank, part.scaling) for own in parts.values() for part in own if isinstance(part, Lora)}
    if len(found) != 1:
        return ""
    rank, scaling = found.pop()
    return f", rank {rank}, s = {scaling:g}"


def _roles(source: Source, adapters: Sequence[Adapter], trained: Mapping[str, Any] | None) -> Roles:
    """What the adapters' configs say of the model they belong to, or who has just trained them."""
    if trained:
        return Roles((f"{trained.get('title', trained['method'])} trained on {source.label}",), ())
    names = {source.label, source.repository, str(source.folder)}
    said = []
    for adapter in adapters:
        own = adapter.settings.model if adapter.settings else ""
        if not own:
            said.append(f"{adapter.label} does not say which model it belongs to")
        elif own in names:
            said.append(f"{adapter.label} says that it belongs to {source.label}")
        else:
            said.append(f"{adapter.label} says that it belongs to {own.rstrip('/').rpartition('/')[2]}")
    return Roles(tuple(said), ())
