"""What commands that train print: the terms of the loss as they go, and what came of it."""

import shlex
from typing import TYPE_CHECKING, Any

from surgery.cli import output

if TYPE_CHECKING:
    from surgery.train.running import Trained

# Lines of progress that a run prints, whatever its length.
_LINES = 20


def preset(name: str, method: Any, training: Any) -> None:
    """Say which preset was taken and what it comes to."""
    shown = ("steps", "batch_size", "max_length", "lr", "lora_rank", "lora_alpha")
    trains = [f"{option.replace('_', ' ')} {getattr(training, option)}" for option in shown]
    output.note(f"preset {name}: {method.title}, {', '.join(trains)}" + (", all weights" * training.full))


def progress(done: int, total: int, terms: dict[str, float], left: float) -> None:
    """One line for each twentieth of the steps: the terms of the loss and the time left."""
    if done != 1 and done != total and done * _LINES // total == (done - 1) * _LINES // total:
        return
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in terms.items())
    output.note(f"[{done}/{total}] {values}, {_clock(left)} left")


def shard(name: str, done: int, total: int) -> None:
    """One line for each shard written."""
    output.note(f"merged [{done}/{total}] {name}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome(done: "Trained") -> None:
    """The summary of a run for people."""
    first, last = done.history[0], done.history[-1]
    terms = [name for name in first if name not in ("gradient_norm", "lr")]
    told = done.record
    pairs = [
        ("method", f"{told['title']}: {told['equation']}"),
        *(("data", _data(name, data)) for name, data in told["data"].items()),
        ("loss", "\n".join(f"{name} {first[name]:.4g} to {last[name]:.4g}" for name in terms)),
    ]
    if "spared" in told:
        spared = {name: output.percent(share) for name, share in told["spared"].items()}
        pairs.append(
            ("spared", f"{spared['directions']} of the directions of inputs (median matrix), "
             f"with {spared['energy']} of the edit's energy")
        )  # fmt: skip
    if done.merged is not None:
        total = done.merged.totals
        pairs += [
            ("tensors", f"{total['edited']} edited, {total['copied']} copied"),
            ("retention", f"{output.percent(total['retention'])} of the edit is in the stored weights "
             f"(worst tensor {output.percent(total['retention_min'])})"),
        ]  # fmt: skip
    pairs += [("cost", f"{done.seconds:.1f} s"), ("output", str(done.output))]
    if done.adapter is not None and done.adapter != done.output:
        pairs.append(("adapter", str(done.adapter)))
    if done.merged is not None:
        pairs.append(("next", f"surgery verify {shlex.quote(str(done.output))}; evaluate before you publish"))
    output.rows(pairs)


def _data(name: str, data: dict[str, Any]) -> str:
    return f"{name}: {data['rows']} rows of {', '.join(source['source'] for source in data['sources'])}"


def warnings(done: "Trained") -> None:
    """What a careful user should know about a run, on stderr."""
    for note in done.notes:
        output.note(f"warning: {note}")
    if done.merged is not None and done.merged.totals["unchanged"]:
        output.note(
            f"warning: of {done.merged.totals['unchanged']} tensors nothing is changed in their dtype; "
            "surgery.tensors.jsonl names them, and --dtype float32 keeps what was trained"
        )
    if done.merged is not None and (done.merged.totals["retention_min"] or 1) < 0.99:
        kept = output.percent(done.merged.totals["retention_min"])
        output.note(f"warning: a tensor keeps {kept} of its edit; --dtype float32 or --as-lora keeps more")
