"""A planned run: sources resolved, headers read, every tensor accounted for, nothing written yet."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from surgery import memory, provenance, resources, workers
from surgery.adapter import adapter_method, adapter_size, refuse_unplaceable
from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.quantised import refuse_quantised
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.sidecars import Sidecars, list_sidecars
from surgery.checkpoint.staging import partial_of
from surgery.editing import AbstractEditor, Editor, compute_device
from surgery.errors import InputError, UsageError
from surgery.hub import Source, resolve
from surgery.hub.remote import open_source
from surgery.inputs import checkpoint_fingerprint
from surgery.kernels import backend
from surgery.methods.base import WeightEdit
from surgery.options import Options
from surgery.order import check_order
from surgery.plan import Plan, Step, output_size, plan_steps, seconds_estimate


@dataclass(frozen=True)
class Job(ABC):
    """A planned run: the files of one checkpoint, some of its tensors edited by what other sources say.

    Attributes:
        options: How to run.
        sources: By role, the edited checkpoint's among them.
        checkpoints: Their headers, by the same roles.
        plan: What happens to every tensor.
        output: The folder to write.
        edited: The role of the checkpoint whose files are edited.
    """

    options: Options
    sources: Mapping[str, Source]
    checkpoints: Mapping[str, Checkpoint]
    plan: Plan
    output: Path

    edited: ClassVar[str]

    @property
    def aligned(self) -> Checkpoint:
        """The checkpoint whose files are edited."""
        return self.checkpoints[self.edited]

    @property
    @abstractmethod
    def base(self) -> Checkpoint:
        """What the edits are computed from, beside the edited checkpoint itself."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The method, as manifests and cards name it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the manifest says of the method itself: its name, where it comes from, every option."""

    @abstractmethod
    def editor(self, aligned: Reader, base: Reader) -> AbstractEditor:
        """What edits the tensors.

        Args:
            aligned: Reads `self.aligned`.
            base: Reads `self.base`.
        """

    @abstractmethod
    def inputs_of(self, shard: Shard) -> Iterator[tuple[str, Shard]]:
        """Role and file of every input that writing a shard of the edited checkpoint reads, itself first."""

    @abstractmethod
    def nothing_changed(self) -> str:
        """What to tell a user whose run would change no tensor."""

    def beside(self, role: str) -> tuple[str, ...]:
        """Files of a source beside its weights that the output depends on."""
        return self.plan.sidecars.carried if role == self.edited else ()

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for another run to take up where this one stopped."""
        return {
            "version": provenance.versions(),
            **{key: value for key, value in self.identity().items() if key != "paper"},
            "threads": torch.get_num_threads(),
            "device": compute_device(self.options).type,
            "backends": backend.recorded(compute_device(self.options)),
            **{
                role: checkpoint_fingerprint(checkpoint, self.sources[role], self.beside(role))
                for role, checkpoint in self.checkpoints.items()
            },
        }


@dataclass(frozen=True)
class PairJob(Job):
    """A weight edit of an aligned checkpoint, computed from it and the base that it was made from.

    Attributes:
        method: What `apply` is about to carry out.
    """

    method: WeightEdit

    edited = "aligned"

    @property
    def base(self) -> Checkpoint:
        """The checkpoint before alignment."""
        return self.checkpoints["base"]

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    def identity(self) -> dict[str, Any]:
        """The method, its paper and all options."""
        return {
            "method": self.method.name,
            "paper": self.method.paper,
            "options": provenance.option_values(self.method, self.options),
        }

    def editor(self, aligned: Reader, base: Reader) -> Editor:
        """The method at work on the two."""
        return Editor(self.method, self.options, aligned, base)

    def inputs_of(self, shard: Shard) -> Iterator[tuple[str, Shard]]:
        """The shard, and the shards of the base that its edits need."""
        yield "aligned", shard
        steps = (self.plan.steps[info.name] for info in shard.header.tensors)
        needed = {self.base.tensors[step.base].file for step in steps if step.action == "edit" and step.base}
        yield from (("base", other) for other in self.base.shards if other.name in needed)

    def nothing_changed(self) -> str:
        """The two checkpoints hold the same weights."""
        return (
            f"alignment changed none of the selected tensors: {self.base.label} and {self.aligned.label} hold the "
            "same weights there; check that base is the checkpoint before alignment"
        )


def default_output(source: Source, label: str) -> Path:
    """`./<source>-<label>` for a source of any kind."""
    name = source.repository or source.label
    stem = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2] if source.repository else name)
    return Path(f"{stem}-{label}")


def prepare(
    method: WeightEdit,
    *,
    base: str | Path,
    model: str | Path,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> PairJob:
    """Resolve, read headers and plan; nothing is written and no tensor data is read.

    Args:
        method: What to do, such as `LoX(rank=6, alpha=1.5)`.
        base: The checkpoint before alignment: a folder, `ORG/NAME[@REVISION]`, `demo:base`.
        model: The aligned checkpoint.
        output: The folder to write; by default `./<aligned>-<method>`.
        options: How to run.

    Raises:
        SurgeryError: Anything that would keep the run from succeeding, as far as headers tell.
    """
    # One thread a tensor and several tensors at once: none waits for another, and no byte depends on their number.
    torch.set_num_threads(1)
    sources = {
        role: resolve(
            named, allow_pickle=options.allow_pickle, weights="stream" if options.stream else "defer"
        )
        for role, named in (("base", base), ("aligned", model))
    }
    compute_device(options)
    label = method.label() + ("-adapter" if options.as_lora else "")
    target = Path(output) if output is not None else default_output(sources["aligned"], label)
    _refuse_same(sources)
    refuse_paths(sources, target)
    checkpoints = {
        role: open_source(source, allow_pickle=options.allow_pickle) for role, source in sources.items()
    }
    for checkpoint in checkpoints.values():
        refuse_quantised(checkpoint)
    notes: tuple[str, ...] = ()
    if options.as_lora:
        method, note = adapter_method(method, checkpoints["aligned"])
        notes = (note,) if note else ()
    plan = _plan(method, sources, checkpoints, target, options, notes)
    return PairJob(options, sources, checkpoints, plan, target, method)


def _refuse_same(sources: Mapping[str, Source]) -> None:
    """Refuse an edit of a model by itself."""
    if sources["base"].folder.resolve() == sources["aligned"].folder.resolve():
        raise InputError(
            f"base and aligned are both {sources['base'].label}, so their difference would be zero; "
            "give the checkpoint before alignment as BASE"
        )


def refuse_paths(sources: Mapping[str, Source], output: Path) -> None:
    """Refuse an output that lies in an input or the other way round, or that cannot be made.

    Raises:
        UsageError: So it is.
    """
    folders = {role: source.folder.resolve() for role, source in sources.items()}
    if output.name in ("", ".."):
        raise UsageError(f"the output is {str(output)!r}, and a folder that can be made is needed; name one")
    # The folder the output is built in is emptied when it is left from an earlier run, so it is checked as well.
    target, building = output.absolute().resolve(), partial_of(output.absolute()).resolve()
    for role, folder in folders.items():
        if _overlap(target, folder) or _overlap(building, folder):
            raise UsageError(
                f"the output {output} and the {role} checkpoint share a folder; choose another --output"
            )
    if output.is_symlink():
        raise UsageError(f"the output {output} is a link; choose another --output, or name what it points to")


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _plan(
    method: WeightEdit,
    sources: Mapping[str, Source],
    checkpoints: Mapping[str, Checkpoint],
    output: Path,
    options: Options,
    adapter_notes: tuple[str, ...] = (),
) -> Plan:
    aligned, base = checkpoints["aligned"], checkpoints["base"]
    roles = check_order(sources["base"], sources["aligned"], i_checked_the_order=options.i_checked_the_order)
    steps, notes = plan_steps(method, aligned, base, dtype=options.dtype)
    if options.as_lora:
        refuse_unplaceable(method, aligned, base, steps)
    sidecars = list_sidecars(aligned)
    read = sum(aligned.tensors[step.name].nbytes for step in steps.values())
    # Of tensors that are copied the partner is read too, for NaN and infinity.
    read += sum(base.tensors[step.base].nbytes for step in steps.values() if step.base)
    written = adapter_size(method, steps) if options.as_lora else model_size(aligned, steps, sidecars)
    return Plan(
        steps=steps,
        equation=method.equation(),
        equivalent=method.equivalent(),
        notes=(*aligned.notes, *base.notes, *notes, *adapter_notes, *cast_note(options)),
        roles=roles,
        sidecars=sidecars,
        bytes_read=read,
        bytes_written=written,
        memory_bytes=memory.estimate(steps, aligned, base, options.memory_limit),
        seconds_estimate=seconds_estimate(steps, read + written, workers.count()),
        disk_free=resources.disk_free(output),
        drops_rest=method.anchor == "base",
    )


def model_size(checkpoint: Checkpoint, steps: Mapping[str, Step], sidecars: Sidecars) -> int:
    """Bytes of a written model: its tensors and what is carried beside them."""
    carried = sum((checkpoint.folder / name).stat().st_size for name in sidecars.carried)
    return carried + sum(output_size(step) for step in steps.values())


def cast_note(options: Options) -> tuple[str, ...]:
    """What `--dtype` does, in one sentence; nothing where it keeps every dtype."""
    return () if options.dtype == "keep" else (f"every floating tensor is cast to {options.dtype} (--dtype)",)
