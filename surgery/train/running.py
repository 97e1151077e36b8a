"""From a model and data to a model: train, keep what training changed, merge it into the files.

resolve -> data -> `OUT-adapter.partial` with the run's states -> adapter or deltas -> the merge that any adapter goes
through -> `OUT`. The model is loaded to be trained and never saved: the files come from the merge.
"""

import gc
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery import allocator, resources, workers
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.quantised import refuse_quantised
from surgery.checkpoint.staging import MANIFEST, Staging, fsync_folder, refuse_existing
from surgery.checkpoint.writer import write_file
from surgery.edits import Progress as ShardProgress
from surgery.errors import ResourceError, UsageError
from surgery.hub import Source, resolve
from surgery.hub.remote import open_source
from surgery.job import refuse_paths
from surgery.merging import merge
from surgery.options import Options
from surgery.pipeline import Outcome
from surgery.processes import team
from surgery.train import data as data_sets
from surgery.train import network, record, sparing
from surgery.train.crew import Crew, assemble
from surgery.train.deltas import write_deltas
from surgery.train.feed import Feed
from surgery.train.loop import Progress, Run
from surgery.train.sources import Columns
from surgery.train.state import States, save_weights
from surgery.train.step import Stream, TrainedMethod
from surgery.train.tracking import tracking
from surgery.train.training import Training

# Where in the work folder what was trained goes: the name by which the merge, and so the manifest, calls it.
_RESULT = "adapter"


@dataclass(frozen=True)
class Trained:
    """What a training run wrote and how it went.

    Attributes:
        output: The folder: a model, or with `as_lora` an adapter.
        adapter: The adapter's folder where it was kept, None otherwise.
        history: The terms of the loss, the gradient's norm and the learning rate of every step.
        record: What stands in the manifest of how the model came to be.
        notes: What a careful user should know of the data, and of what the run came to.
        merged: The outcome of the merge; None with `as_lora`.
        seconds: Wall time of the run, a resumed one from when it was taken up.
    """

    output: Path
    adapter: Path | None
    history: tuple[dict[str, float], ...]
    record: Mapping[str, Any]
    notes: tuple[str, ...]
    merged: Outcome | None
    seconds: float

    def document(self) -> dict[str, Any]:
        """The run as `--json` prints it."""
        return {
            "output": str(self.output),
            "adapter": str(self.adapter) if self.adapter else None,
            "training": dict(self.record),
            "steps": len(self.history),
            "loss": {"first": self.history[0], "last": self.history[-1]},
            "notes": list(self.notes),
            "merge": self.merged.document() if self.merged else None,
            "seconds": round(self.seconds, 3),
        }


def immunise(
    method: TrainedMethod,
    *,
    model: str | Path,
    data: Mapping[str, data_sets.Sources] | None = None,
    output: str | Path | None = None,
    training: Training = Training(),  # noqa: B008 - frozen
    options: Options = Options(),  # noqa: B008 - frozen
    columns: Columns = Columns(),  # noqa: B008 - frozen
    progress: Progress | None = None,
    merging: ShardProgress | None = None,
) -> Trained:
    """Train a model by a method and return what was written.

    `surgery.immunise(Vaccine(rho=2), model="ORG/NAME", data={"aligned": "refusals.jsonl"}, output="out")` is
    `surgery vaccine ORG/NAME --rho 2 --aligned-data refusals.jsonl -o out`.

    Args:
        method: What to minimise.
        model: The checkpoint to start from: a folder, `ORG/NAME[@REVISION]`, `demo:aligned`.
        data: A source or several for each set that the method names; `demo:` models have their own.
        output: The folder to write; by default `./<model>-<method>`.
        training: How to train.
        options: How to write; `seed` and `device` are of the training too.
        columns: Where the rows keep prompt and response.
        progress: Called after each step.
        merging: Called after each shard written.

    Raises:
        SurgeryError: The run failed; `output` does not exist, or is what it was before.
    """
    started = time.monotonic()
    job = _prepare(method, model, data or {}, output, training, options, columns)
    with ExitStack() as stack:
        result, merged = job.carry_out(stack, progress, merging)
    history = result["history"]
    return Trained(
        output=job.target,
        adapter=job.kept if training.keep_adapter or options.as_lora else None,
        history=tuple(history),
        record=job.record(result),
        notes=(*record.notes(job.sets, job.training), *method.signs(history[0], history[-1])),
        merged=merged,
        seconds=time.monotonic() - started,
    )


def _prepare(
    method: TrainedMethod,
    model: str | Path,
    data: Mapping[str, data_sets.Sources],
    output: str | Path | None,
    training: Training,
    options: Options,
    columns: Columns,
) -> "_Job":
    """Everything read, tokenised and checked, so that no hour of training ends in a refusal."""
    if training.full and options.as_lora:
        raise UsageError("--full trains all weights, which no adapter holds; leave out --full or --as-lora")
    # A merge in this process leaves torch with one thread, and sums depend on their number.
    torch.set_num_threads(workers.count())
    source = resolve(model, allow_pickle=False, weights="fetch")
    checkpoint = open_source(source)
    refuse_quantised(checkpoint)
    target = Path(output) if output is not None else record.default_output(method, source)
    refuse_paths({"model": source}, target)
    _refuse_disk(checkpoint, target)
    refuse_existing(target, overwrite=options.overwrite)
    chosen = data_sets.choose(method, str(model), data)
    tokenizer = network.load_tokenizer(checkpoint)
    training = replace(training, max_length=min(training.max_length, _positions(checkpoint)))
    sets = data_sets.load(chosen, tokenizer, training.max_length, columns)
    streams = method.streams({name: one.rows for name, one in sets.items()}, options.seed)
    kept = target if options.as_lora else target.with_name(target.name + "-adapter")
    crew = assemble(options.device, track=training.track, logs=target.with_name(target.name + "-logs"))
    if training.spare:
        sparing.require(method, crew)
    return _Job(
        method, source, checkpoint, tokenizer, sets, streams, training, options, columns, target, kept, crew
    )


def _refuse_disk(checkpoint: Checkpoint, target: Path) -> None:
    """Refuse before hours of training what the merge after them would refuse."""
    if checkpoint.total_bytes > (free := resources.disk_free(target)):
        raise ResourceError(
            f"the output needs {checkpoint.total_bytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free where "
            f"{target} goes; free some space or choose another --output"
        )


def _positions(checkpoint: Checkpoint) -> int:
    """The longest row the model was made for, where its config says."""
    config = checkpoint.config
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    return limit if isinstance(limit, int) and limit >= 2 else 1 << 30


@dataclass(frozen=True)
class _Job:
    """A run with everything read and nothing trained."""

    method: TrainedMethod
    source: Source
    checkpoint: Checkpoint
    tokenizer: Any
    sets: Mapping[str, data_sets.DataSet]
    streams: Mapping[str, Stream]
    training: Training
    options: Options
    columns: Columns
    target: Path
    kept: Path
    crew: Crew

    def record(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """How the output came to be, for its manifest and card."""
        return record.trained(
            self.method,
            self.source,
            self.sets,
            self.training,
            self.options,
            self.columns,
            self.crew,
            **result,
        )

    def carry_out(
        self, stack: ExitStack, progress: Progress | None, merging: ShardProgress | None
    ) -> tuple[dict[str, Any], Outcome | None]:
        """Train in the work folder, merge what came of it, and leave no work behind; the run as `_train` has it."""
        together = team()
        fingerprint = record.fingerprint(
            self.method, self.source, self.checkpoint, self.sets, self.training, self.options, self.crew
        )
        opened = together.agree(lambda: self._open(stack, fingerprint) if together.leads else None)
        staging = together.agree(lambda: opened or Staging.join(self.kept, fingerprint, together.rank))
        done = together.gather(staging.entries)[0]
        found = [entry for entry in done if "history" in entry]
        # With all weights trained memory is what runs out, and freed tensors that are kept cost a fifth of it.
        with nullcontext() if self.training.full else allocator.freed_kept():
            result = found[0] if found else self._train(staging, progress)
        merged = None
        if not self.options.as_lora:
            options = replace(self.options, as_lora=False)
            merged = merge(
                self._named(),
                staging.path / _RESULT,
                output=self.target,
                options=options,
                trained=self.record(result),
                progress=merging,
            )
        together.agree(lambda: self._finish(staging, result) if together.leads else None)
        return result, merged

    def _named(self) -> str | Path:
        """The model as the merge is to take it; one from the Hub at the very commit that was trained."""
        if self.source.repository is not None:
            return f"hf://{self.source.repository}@{self.source.commit}"
        return self.source.label if self.source.label.startswith("demo:") else self.source.folder

    def _open(self, stack: ExitStack, fingerprint: Mapping[str, Any]) -> Staging:
        overwrite = self.options.overwrite
        return stack.enter_context(Staging(self.kept, fingerprint, overwrite=overwrite))

    def _train(self, staging: Staging, progress: Progress | None) -> dict[str, Any]:
        """Train, and put what it came to into the work folder: `history`, and `spared` where something was."""
        leads, label = self.crew.rank == 0, self.source.label
        dtype, autocast = network.precision(self.training, self.crew.device)
        model = network.load_model(self.checkpoint, dtype)
        model = network.make_trainable(model, self.method, self.training, label=label, seed=self.options.seed)
        states = States(staging.path, label, writes=leads)
        feed = self._feed()
        run = Run(self.method, model, feed, self.training, self.options.seed, self.crew, states, autocast)
        with tracking(self.crew, self.training, self.method, progress) as told:
            kept: dict[str, Any] = {"history": run.fit(told)}
        if self.training.spare:
            share, seed = self.training.spare, self.options.seed
            spared = sparing.spare(model, self.sets["retain"].rows, share, seed=seed)
            # Of one process: what is recorded must not differ between them by rounding.
            kept["spared"] = team().gather(asdict(spared))[0]
        result = staging.path / _RESULT
        if leads:
            result.mkdir(exist_ok=True)
        if self.training.full:
            write_deltas(model, self.checkpoint, result, write=leads)
        else:
            save_weights(model, result, label, write=leads)
        if leads:
            fsync_folder(result)
            staging.record(kept)
            states.clear()
        del model, run
        gc.collect()
        if self.crew.device.type == "cuda":
            torch.cuda.empty_cache()
        return kept

    def _feed(self) -> Feed:
        ends = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        pad = next((one for one in ends if one is not None), 0)
        return Feed(
            self.streams,
            self.training.batch_size,
            self.training.gradient_accumulation,
            self.options.seed,
            pad,
            self.crew.device,
            self.crew.rank,
            self.crew.world,
        )

    def _finish(self, staging: Staging, result: Mapping[str, Any]) -> None:
        """Keep the adapter under its own name, or remove the work folder."""
        if not (self.training.keep_adapter or self.options.as_lora):
            shutil.rmtree(staging.path)
            return
        for file in (staging.path / _RESULT).iterdir():
            file.rename(staging.path / file.name)
        (staging.path / _RESULT).rmdir()
        text = record.manifest(self.record(result), staging.path)
        write_file(staging.path / MANIFEST, text)
        staging.commit()
