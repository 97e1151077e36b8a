"""From sources to a report: the whole of `surgery evaluate`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from surgery import allocator
from surgery.attacking import campaign, ground
from surgery.attacking.ground import Ground
from surgery.attacking.settings import Budget
from surgery.errors import InputError, UsageError
from surgery.evaluate import assessment, harness, keeping, materials, report
from surgery.evaluate.assessment import Say, Subject
from surgery.evaluate.suites import Measuring
from surgery.judging.choice import USUAL, Choice
from surgery.train.sources import Columns


@allocator.freed_kept()
def evaluate(
    model: str | Path,
    *,
    output: Path,
    reference: str | Path | None = None,
    reference_from: Path | None = None,
    data: Mapping[str, Sequence[str]] | None = None,
    measuring: Measuring = Measuring(),  # noqa: B008 - frozen
    budget: Budget | None = None,
    judge: Choice = USUAL,
    base: str | Path | None = None,
    tasks: Sequence[str] = (),
    tasks_path: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    columns: Columns = Columns(),  # noqa: B008 - frozen
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure a model under the four conditions and return the report; studies are kept in the output folder.

    Args:
        model: A folder, `ORG/NAME[@REVISION]`, `demo:aligned`.
        output: The folder of the report; made if need be.
        reference: The undefended model; it goes through the same attacks.
        reference_from: The output of an evaluation of that model with the same options, whose figures are taken.
        data: Sources by the names of `surgery.attacking.ground.NAMES` and of `surgery.evaluate.materials.read`; where
            one of the two models is a `demo:` one, the embedded data stand in.
        measuring: How much is measured.
        budget: Of the attackers; by default the suite's.
        judge: Which.
        base: The checkpoint before alignment, where the attacker has it.
        tasks: Tasks of lm-eval.
        tasks_path: A folder with task files.
        seed: Of what has no seed of its own.
        device: Where to compute.
        columns: Where the rows keep prompt and response.
        say: Told of progress.

    Raises:
        SurgeryError: Something cannot be used; finished trials are kept.
    """
    from surgery.evaluate.suites import budget as suited

    if reference_from is not None and reference is None:
        raise UsageError("--reference-from has figures of the reference; give --reference as well")
    budget = budget or suited(measuring.suite, {})
    data = data or {}
    embedded = any(str(source).startswith("demo:") for source in (model, reference))
    found = materials.read(data, measuring.limit(), seed, columns, embedded=embedded)
    given = {name: data[name] for name in ground.NAMES if name in data}
    own = given or (ground.DEMO if embedded else {})

    def placed(source: str | Path) -> Ground:
        return ground.prepare(
            source, own, budget, judge, base=base, seed=seed, device=device, columns=columns
        )

    ours = placed(model)
    theirs = placed(reference) if reference is not None else None
    _refuse_unlike(ours, theirs)
    campaign.chosen_on(ours, budget)  # to refuse what is asked for before anything is measured
    assessed = partial(
        keeping.assessed, materials=found, measuring=measuring, budget=budget, seed=seed, say=say
    )
    others: assessment.Assessment | None = None
    if theirs is not None:
        # First: what cannot be taken is to be known before hours are spent on the model.
        folder = reference_from / "model" if reference_from else _folder(output, "reference")
        other = Subject(theirs, folder)
        others = assessed(other, required=reference_from is not None)
    subject = Subject(ours, _folder(output, "model"))
    mine = assessed(subject)
    both: assessment.Scores = {}
    inside: dict[str, Any] = {}
    if others is not None:
        both = assessment.compared(subject, other, mine, others, found)
        if measuring.inside:
            inside["prefill_cosine"] = assessment.prefill_cosines(subject, other)
    both |= _answered(ours, tasks, tasks_path, measuring, say)
    return report.build(ours, theirs, mine, others, both, found, measuring, budget, inside)


def _answered(
    ground: Ground, tasks: Sequence[str], folder: Path | None, measuring: Measuring, say: Say
) -> assessment.Scores:
    """The scores of lm-eval's tasks; none where none are named."""
    if not tasks:
        return {}
    say(f"{ground.source.label}: lm-eval")
    target = ground.target
    scores = harness.run(target.model, target.tokenizer, tasks, include_path=folder, limit=measuring.limit())
    return {f"stability.lm_eval.{name}": score for name, score in scores.items()}


def _folder(output: Path, name: str) -> Path:
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_unlike(ours: Ground, theirs: Ground | None) -> None:
    """Refuse models that no number compares."""
    if theirs is None:
        return
    sizes = [one.target.model.get_input_embeddings().weight.shape for one in (ours, theirs)]  # type: ignore[operator]
    if len(set(sizes)) > 1:
        raise InputError(
            f"{ours.source.label} and {theirs.source.label} have embeddings of {tuple(sizes[0])} and "
            f"{tuple(sizes[1])}; give the undefended model of the same architecture as --reference"
        )
