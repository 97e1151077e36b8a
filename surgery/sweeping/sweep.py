"""The whole of `surgery sweep`: try many edits of one model in memory, keep what each came to.

LoX is decomposed once and patched into the model's weights; a method that trains does so anew in every trial.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgery.attacking import ground
from surgery.attacking.ground import Ground
from surgery.attacking.settings import Budget
from surgery.errors import UsageError
from surgery.evaluate import materials
from surgery.inputs import checkpoint_fingerprint
from surgery.judging.choice import USUAL, Choice
from surgery.methods.lox import LoX
from surgery.options import Options
from surgery.pipeline import apply
from surgery.studying import Study
from surgery.sweeping import study as trials
from surgery.sweeping.effective_rank import effective_rank, ladder
from surgery.sweeping.fields import lists, product
from surgery.sweeping.front import Objective, front
from surgery.sweeping.grid import CHOOSING, Grid, lox
from surgery.sweeping.patching import open_patcher
from surgery.sweeping.probing import Probe, Probing, measured
from surgery.sweeping.trained import Trainer
from surgery.train import data as data_sets
from surgery.train import presets
from surgery.train.sources import Columns
from surgery.train.step import TrainedMethod
from surgery.train.training import Training

_LENGTH = 256


@dataclass(frozen=True)
class Setting:
    """Where and how the trials of a sweep are measured.

    Attributes:
        output: The folder of the sweep; made if need be.
        probing: What is measured.
        budget: Its `limit`, `max_length`, `max_new_tokens` and `margin` hold here.
        options: How edits are rounded; seed and device.
        columns: Where the rows keep prompt and response.
        data: Sources, as an evaluation takes them; a `demo:` model has its own.
        judge: Which.
        storage: A database to share in place of the journal.
    """

    output: Path
    probing: Probing
    budget: Budget
    options: Options
    columns: Columns
    data: Mapping[str, Sequence[str]] = field(default_factory=dict)
    judge: Choice = USUAL
    storage: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to run.

    Attributes:
        method: What is swept.
        planned: The parameters of every trial.
        model: What is measured.
        state: Puts it into a trial's state.
        probe: Measures it there.
        study: Keeps the trials.
        write: Writes what a trial came to, as the method's own command does.
    """

    method: str
    planned: Sequence[trials.Params]
    model: nn.Module
    state: trials.State
    probe: Probe
    study: Study
    write: Callable[[trials.Params, Path], Any]

    def run(self, progress: trials.Progress | None = None) -> dict[str, Any]:
        """Run what no other process has run; returns `sweep.json`."""
        ended = trials.run(self.study, self.planned, self.model, self.state, self.probe, progress)
        return document(self, ended)

    def effective_rank(self, largest: int, progress: trials.Progress | None = None) -> dict[str, Any]:
        """The behavioural effective rank, scanned up to `largest`."""
        found = effective_rank(
            self.study,
            ladder(largest),
            self.model,
            self.state,
            self.probe,
            metric=f"resistance.unattacked_{self.probe.ground.rate}",
            progress=progress,
        )
        return found.document()


def objectives(rate: str, *, practice: bool) -> list[Objective]:
    """What a release wants of an edit: to break late, to answer as before, and to go on learning."""
    found = [
        Objective("resistance.steps_to_break", "max"),
        Objective("resistance.harmful_loss", "max"),
        Objective("stability.perplexity_ratio", "min"),
        Objective("stability.over_refusal", "min"),
    ]
    return [*found, Objective("trainability.final_loss", "min")] if practice else found


def document(sweep: Sweep, ended: Sequence[trials.Measured]) -> dict[str, Any]:
    """Trials, and which of them no other beats in everything."""
    wanted = objectives(sweep.probe.ground.rate, practice=sweep.probe.probing.practice)
    known = {name for trial in ended for name in trial.scores}
    able = [objective for objective in wanted if objective.name in known]
    best = front(ended, able) if able else ()
    return {
        "schema": 1,
        **sweep.probe.ground.document(),
        "method": sweep.method,
        "probing": asdict(sweep.probe.probing),
        "objectives": {objective.name: objective.direction for objective in able},
        "trials": [{**trial.document(), "front": trial in best} for trial in ended],
    }


def prepare_lox(
    base: str | Path,
    aligned: str | Path,
    grid: Grid,
    setting: Setting,
    *,
    fields: Sequence[str] = (),
    largest: int | None = None,
) -> Sweep:
    """Load the model and the data, decompose the update, and open the study.

    Args:
        base: The checkpoint before alignment.
        aligned: The aligned checkpoint.
        grid: Ranks, alphas and anchors.
        setting: Where and how.
        fields: Lists for fields that choose tensors, as `layers=0:2,2:4`.
        largest: Decompose up to this rank, for a scan of the effective rank.

    Raises:
        SurgeryError: Something cannot be used.
    """
    # Before anything is loaded: a grid that LoX refuses is a slip of the pen.
    given = lists(fields, [LoX])
    if strange := sorted(given.keys() - set(CHOOSING)):
        raise UsageError(
            f"set names {strange[0]}, and a sweep of LoX decomposes once; it varies {', '.join(CHOOSING)} beside "
            "--rank, --alpha and --anchor"
        )
    planned = [{**params, **more} for params in grid.trials(LoX()) for more in product(given)]
    for params in planned:
        lox(LoX(), params)
    place, found = _ground(aligned, setting)
    rank = max((one for one in (grid.largest(), largest) if one), default=None)
    setting.output.mkdir(parents=True, exist_ok=True)
    patcher = open_patcher(
        LoX(rank=rank or "full"),
        place.target.model,
        base=base,
        aligned=aligned,
        output=setting.output,
        options=setting.options,
    )

    def write(params: trials.Params, output: Path) -> Any:
        return apply(lox(LoX(), params), base=base, model=aligned, output=output, options=setting.options)

    own = {"base": str(base), "rounding": setting.options.rounding, "decomposed at": rank or "full"}
    probe, study = _probe(place, found, setting), _study("lox", place, setting, own)
    return Sweep("lox", planned, place.target.model, patcher.patched, probe, study, write)


def prepare_trained(
    kind: type[TrainedMethod],
    model: str,
    setting: Setting,
    *,
    fields: Sequence[str],
    preset: presets.Preset,
    data: Mapping[str, data_sets.Sources],
) -> Sweep:
    """Load the model and the data, and open the study; nothing is trained yet.

    Args:
        kind: The method.
        model: The checkpoint to train.
        setting: Where and how.
        fields: Lists for fields of the method or of the training, as `rho=1,2,4`.
        preset: Where the values of the other fields come from.
        data: The method's data sets, by name; a `demo:` model has its own.

    Raises:
        SurgeryError: Something cannot be used.
    """
    planned = product(lists(fields, [kind, Training]))
    place, found = _ground(model, setting)
    trainer = Trainer(
        kind, model, place.target.model, setting.output, preset, data, setting.options, setting.columns
    )
    for params in planned:
        trainer.check(params)
    setting.output.mkdir(parents=True, exist_ok=True)
    own = {
        "preset": preset,
        "rounding": setting.options.rounding,
        "train": {name: str(sources) for name, sources in sorted(data.items())},
    }
    probe, study = _probe(place, found, setting), _study(kind.name, place, setting, own)
    return Sweep(kind.name, planned, place.target.model, trainer.trained, probe, study, trainer.write)


def _ground(model: str | Path, setting: Setting) -> tuple[Ground, materials.Materials]:
    """The model with the data of attacks, and the data of utility."""
    embedded = str(model).startswith("demo:")
    options, budget, data = setting.options, setting.budget, setting.data
    found = materials.read(data, budget.limit, options.seed, setting.columns, embedded=embedded)
    given = {name: data[name] for name in ground.NAMES if name in data} or (ground.DEMO if embedded else {})
    place = ground.prepare(
        model,
        given,
        budget,
        setting.judge,
        seed=options.seed,
        device=options.device,
        columns=setting.columns,
    )
    return place, found


def _probe(place: Ground, found: materials.Materials, setting: Setting) -> Probe:
    tokens = setting.budget.max_new_tokens
    unedited = measured(place, found, _LENGTH, tokens)
    return Probe(place, found, setting.probing, _LENGTH, tokens, unedited, setting.options.seed)


def _study(method: str, place: Ground, setting: Setting, own: Mapping[str, Any]) -> Study:
    """The study whose trials are of the same model, measured alike."""
    identity = {
        **place.document(),
        "checkpoint": checkpoint_fingerprint(place.checkpoint, place.source),
        "probing": asdict(setting.probing),
        "limit": setting.budget.limit,
        "margin": setting.budget.margin,
        "seed": setting.options.seed,
        **own,
    }
    return Study.open(setting.storage or setting.output, f"sweep {method}", identity=identity)
