"""A planned run: sources resolved, headers read, every tensor accounted for, nothing written yet."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery import memory, provenance, resources, workers
from surgery.adapter import adapter_method, adapter_size, refuse_unplaceable
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.quantised import refuse_quantised
from surgery.checkpoint.sidecars import list_sidecars
from surgery.checkpoint.staging import partial_of
from surgery.editing import compute_device
from surgery.errors import InputError, UsageError
from surgery.hub import Source, resolve
from surgery.hub.remote import open_source
from surgery.inputs import checkpoint_fingerprint
from surgery.kernels import backend
from surgery.methods.base import WeightEdit
from surgery.options import Options
from surgery.order import check_order
from surgery.plan import Plan, output_size, plan_steps, seconds_estimate


@dataclass(frozen=True)
class Job:
    """A planned run: what `apply` is about to carry out."""

    method: WeightEdit
    options: Options
    sources: Mapping[str, Source]
    aligned: Checkpoint
    base: Checkpoint
    plan: Plan
    output: Path

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for another run to take up where this one stopped."""
        carried = self.plan.sidecars.carried
        return {
            "version": provenance.versions(),
            "method": self.method.name,
            "options": provenance.option_values(self.method, self.options),
            "threads": torch.get_num_threads(),
            "device": compute_device(self.options).type,
            "backends": backend.recorded(compute_device(self.options)),
            "base": checkpoint_fingerprint(self.base, self.sources["base"]),
            "aligned": checkpoint_fingerprint(self.aligned, self.sources["aligned"], carried),
        }


def default_output(method: WeightEdit, aligned: Source, options: Options) -> Path:
    """`./<aligned>-lox-r6-a1.5` for a source of any kind; adapters end in `-adapter`."""
    name = aligned.repository or aligned.label
    stem = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2] if aligned.repository else name)
    return Path(f"{stem}-{method.label()}" + ("-adapter" if options.as_lora else ""))


def prepare(
    method: WeightEdit,
    *,
    base: str | Path,
    model: str | Path,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Job:
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
    target = Path(output) if output is not None else default_output(method, sources["aligned"], options)
    _refuse_paths(sources, target)
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
    return Job(method, options, sources, checkpoints["aligned"], checkpoints["base"], plan, target)


def _refuse_paths(sources: Mapping[str, Source], output: Path) -> None:
    """Refuse an edit of a model by itself, and an output that lies in an input or the other way round."""
    folders = {role: source.folder.resolve() for role, source in sources.items()}
    if folders["base"] == folders["aligned"]:
        raise InputError(
            f"base and aligned are both {sources['base'].label}, so their difference would be zero; "
            "give the checkpoint before alignment as BASE"
        )
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
    written = sum(output_size(step) for step in steps.values())
    written += sum((aligned.folder / name).stat().st_size for name in sidecars.carried)
    written = adapter_size(method, steps) if options.as_lora else written
    cast = () if options.dtype == "keep" else (f"every floating tensor is cast to {options.dtype} (--dtype)",)
    return Plan(
        steps=steps,
        equation=method.equation(),
        equivalent=method.equivalent(),
        notes=(*aligned.notes, *base.notes, *notes, *adapter_notes, *cast),
        roles=roles,
        sidecars=sidecars,
        bytes_read=read,
        bytes_written=written,
        memory_bytes=memory.estimate(steps, aligned, base, options.memory_limit),
        seconds_estimate=seconds_estimate(steps, read + written, workers.count()),
        disk_free=resources.disk_free(output),
    )
