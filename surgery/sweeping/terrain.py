"""The whole of `surgery landscape`: harm on the plane of LoX and of fine-tuning around an aligned model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_doc import Doc
from torch import Tensor, nn

from surgery import allocator
from surgery.attacking import ground
from surgery.attacking.ground import Ground
from surgery.attacking.settings import Budget
from surgery.attacks.base import Approach
from surgery.attacks.harmful_finetune import HarmfulFinetune
from surgery.choices import require_choices
from surgery.errors import UsageError
from surgery.inputs import checkpoint_fingerprint
from surgery.judging.choice import USUAL, Choice
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.studying import Study
from surgery.sweeping import landscape, study
from surgery.sweeping.grid import numbers
from surgery.sweeping.patching import open_patcher
from surgery.train.sources import Columns


@dataclass(frozen=True)
class Terrain:
    """Which part of the plane is looked at, and what spans it."""

    x: Annotated[str, Doc("Along the direction of LoX, in its length: alpha. A list, or FROM:TO:STEP.")] = (
        "-1:2:0.5"
    )
    y: Annotated[str, Doc("Along fine-tuning, in the same length.")] = "0:0.6:0.15"
    lox_rank: Annotated[int, Doc("Rank of the direction of LoX.")] = 6
    tunings: Annotated[int, Doc("Fine-tunings whose mean is the other direction.")] = 2
    attack_steps: Annotated[int, Doc("Of each fine-tuning, with all weights.")] = 20
    attack_lr: Annotated[float, Doc("Learning rate of the fine-tunings.")] = 1e-4

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("lox_rank", "tunings", "attack_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        self.points()

    def points(self) -> tuple[list[float], list[float]]:
        """The coordinates along both directions."""
        return numbers(self.x, "x", "-1:2:0.5"), numbers(self.y, "y", "0:0.6:0.15")


@allocator.freed_kept()
def draw(
    base: str | Path,
    aligned: str | Path,
    *,
    output: Path,
    terrain: Terrain,
    data: Mapping[str, Sequence[str]] | None = None,
    budget: Budget = Budget(),  # noqa: B008 - frozen
    judge: Choice = USUAL,
    options: Options = Options(),  # noqa: B008 - frozen
    columns: Columns = Columns(),  # noqa: B008 - frozen
    progress: study.Progress | None = None,
) -> dict[str, Any]:
    """Measure harm at every point of the grid; returns `landscape.json`.

    Args:
        base: The checkpoint before alignment.
        aligned: The aligned checkpoint, at the origin.
        output: The folder; made if need be.
        terrain: Where to look.
        data: Sources, as an attack takes them; a `demo:` model has its own.
        budget: Its `limit`, `max_length` and `max_new_tokens` hold here.
        judge: Which.
        options: Seed and device.
        columns: Where the rows keep prompt and response.
        progress: Called after each point.
    """
    place = ground.prepare(
        aligned, data or {}, budget, judge, seed=options.seed, device=options.device, columns=columns
    )
    output.mkdir(parents=True, exist_ok=True)
    model = place.target.model
    patcher = open_patcher(LoX(rank=terrain.lox_rank), model, base=base, aligned=aligned, output=output,
                           options=options)  # fmt: skip
    first = patcher.direction(terrain.lox_rank)
    second = landscape.orthogonal(landscape.mean_direction(fine_tuned(place, terrain)), first)
    identity = {
        **place.document(),
        "checkpoint": checkpoint_fingerprint(place.checkpoint, place.source),
        "base": str(base),
        "terrain": {name: value for name, value in vars(terrain).items() if name not in ("x", "y")},
        "limit": budget.limit,
    }
    opened = Study.open(output, "landscape", identity=identity)

    def measure(seen: nn.Module) -> study.Scores:
        harm = place.probe(seen)
        return {place.rate: harm.asr, "refused": harm.refused, "incoherent": harm.incoherent,
                "harmful_loss": harm.loss, "margin": harm.margin}  # fmt: skip

    xs, ys = terrain.points()
    trials = landscape.grid(landscape.Plane(model, first, second), xs, ys, measure, opened, progress)
    return {
        "schema": 1,
        **place.document(),
        "terrain": dict(vars(terrain)),
        "points": [trial.document() for trial in trials],
    }


def fine_tuned(place: Ground, terrain: Terrain) -> list[dict[str, Tensor]]:
    """How far fine-tunings on harmful rows moved every weight, one for each seed; the model is as it was."""
    model = place.target.model
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    found: list[dict[str, Tensor]] = []

    def watch(steps: int, _: Approach) -> None:
        if steps == terrain.attack_steps:
            with torch.no_grad():
                found.append({name: weight - start[name] for name, weight in model.named_parameters()})

    for seed in range(terrain.tunings):
        HarmfulFinetune(
            kind="full",
            lr=terrain.attack_lr,
            seed=seed,
            steps=terrain.attack_steps,
            every=terrain.attack_steps,
        ).carry_out(place.target, watch)
    return found
