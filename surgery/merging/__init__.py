"""Adapters and deltas folded into a checkpoint's files: planned, rounded, written and verified as every edit is.

The flow is that of `surgery.pipeline`; this package only says which tensor gets which delta. No model class is built
unless the names in the files do not settle where an adapter lands, and no code from a model folder runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.edits import Progress
from surgery.merging.job import MergeJob, Sources, prepare
from surgery.options import Options
from surgery.pipeline import Outcome, run

__all__ = ["MergeJob", "merge", "prepare"]


def merge(
    model: str | Path,
    adapters: Sources,
    *,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    weights: Sequence[float] = (),
    trained: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Fold adapters into a model's files and return what was written.

    `surgery.merge("demo:aligned", "adapter")` is `surgery merge demo:aligned adapter`.

    Args:
        model: The checkpoint: a folder, `ORG/NAME[@REVISION]`, `demo:aligned`.
        adapters: One or several: PEFT LoRA folders or repositories, or folders of dense deltas (`delta*.safetensors`,
            float32, named as the model's tensors).
        output: The folder to write; by default `./<model>-merged`.
        options: How to run.
        weights: What each adapter's deltas are multiplied by, one for each; 1 by default.
        trained: How the adapter was trained, for manifest and card: `method` (its name), and as far as known `title`,
            `paper`, `equation`, `hyperparameters`, `training`, `data`, `seed`, `losses`, `command` (a list of words).
        progress: Called after each shard with its name, how many are done, and how many there are.

    Raises:
        SurgeryError: The run failed; `output` does not exist, or is what it was before.
    """
    job = prepare(model, adapters, weights=weights, output=output, options=options, trained=trained)
    return run(job, progress)
