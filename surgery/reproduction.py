"""Does a published output come out again, from the inputs and options that its manifest names?

The manifest is enough: the edit is carried out once more and each file's SHA-256 is compared with the published
one. Only where they differ are the published weights needed, to tell another processor's rounding from another edit.
"""

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery import equivalence, pipeline, provenance, verification
from surgery.checkpoint.layout import open_checkpoint
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.staging import MANIFEST
from surgery.editing import AbstractEditor, Edited, Record
from surgery.edits import Progress
from surgery.equivalence import Difference
from surgery.errors import CheckError, InputError, UsageError
from surgery.hub import RemoteFile, Source, resolve_records
from surgery.job import Job
from surgery.pipeline import Outcome
from surgery.plan import Step
from surgery.processes import team

Verdict = Literal["identical", "equivalent", "different"]

EQUIVALENT = "equivalent"

_CAPABILITY = "cpu_capability"
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Reproduction:
    """What came of repeating an edit.

    Attributes:
        output: What was reproduced: the folder's name, or `ORG/NAME@COMMIT`.
        verdict: "identical": every file has the published SHA-256. "equivalent": what differs is what other hardware
            and other versions round otherwise, within the certificates. "different": anything else.
        files: How many files were compared.
        changed: Files whose SHA-256 is another one than published.
        tensors: Tensors that differ, and why they are another edit; "equivalent" where they are not.
        environment: Versions, threads, kernels and processor, recorded and here, where the two differ.
        notes: What could not be compared, or differs beside the tensors.
        kept: The folder that was written, where it was asked for.
    """

    output: str
    verdict: Verdict
    files: int
    changed: tuple[str, ...]
    tensors: Mapping[str, str]
    environment: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    kept: str | None

    def require(self, *, strict: bool) -> None:
        """Raise CheckError where the edit did not come out again.

        Args:
            strict: Let only identical bytes pass.
        """
        reasons = [reason for reason in self.tensors.values() if reason != EQUIVALENT]
        if self.verdict == "different":
            told = (*reasons, *self.notes, "its files are others")[0]
            raise CheckError(f"{self.output} is different from its repeated edit: {told}{_more(reasons)}")
        if strict and self.verdict != "identical":
            raise CheckError(
                f"{self.output} is equivalent to its repeated edit, not identical ({', '.join(self.changed)}), and "
                "--strict is on"
            )


def _more(reasons: Sequence[str]) -> str:
    return f" ({len(reasons)} tensors differ)" if len(reasons) > 1 else ""


@dataclass(frozen=True)
class _Published:
    """An output as it was published; of one on the Hub perhaps only what says how it was made.

    Attributes:
        source: Where it is.
        manifest: What made it.
    """

    source: Source
    manifest: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where those of its files are that are here."""
        return self.source.folder

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by name."""
        return {name: entry["sha256"] for name, entry in self.manifest["files"].items()}

    def whole(self) -> bool:
        """Whether all of its files are here."""
        return all((self.folder / name).is_file() for name in self.files)

    def has_weights(self) -> bool:
        """Whether any of its weights are here."""
        return any((self.folder / name).is_file() for name in self.files if name.endswith(_WEIGHTS))


def reproduce(
    named: str | Path,
    *,
    inputs: Mapping[str, str | Path] = verification.NOT_GIVEN,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Carry out again the edit that a manifest describes, and compare.

    Args:
        named: What was published: a folder, or `ORG/NAME[@REVISION]`, of which no weights are fetched.
        inputs: Where inputs lie now, by their role in the manifest; they must be the files that it names.
        output: Where to keep what is written; by default it goes to a temporary folder.
        progress: Called after each shard.

    Raises:
        InputError: There is no manifest, or an input is gone or another one.
        CheckError: The published files are not those of their manifest.
        AccessError: The Hub, the network or the rights do not allow it.
    """
    if team().size > 1:
        raise UsageError("an edit is reproduced by one process; start it without a launcher")
    published = _published(named)
    with ExitStack() as stack:
        place = Path(output) if output is not None else _temporary(stack)
        job = _planned(published, place, inputs, stack)
        done = pipeline.run(job, progress)
        return _compared(published, job, done, str(done.output) if output is not None else None)


def _temporary(stack: ExitStack) -> Path:
    """A folder to write that is gone after the run."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-"))) / "reproduced"


def _published(named: str | Path) -> _Published:
    """The manifest, and the files beside it, checked against it as far as they are here."""
    source, listed = resolve_records(named, (MANIFEST, provenance.TENSORS))
    if source.repository is None:
        source = Source(source.label, Path(os.path.abspath(source.folder)))
    _refuse_trained_adapter(source)
    found = _Published(source, verification.manifest_of(source.folder))
    if source.repository is None and found.has_weights():
        verification.check_files(source.folder, found.manifest)
    else:
        _check_present(found)
    _check_listed(found, listed)
    return found


def _refuse_trained_adapter(source: Source) -> None:
    """Refuse what a training left: repeating it is no edit of files."""
    try:
        document = provenance.read_manifest(source.folder)
    except (OSError, ValueError):
        return
    if document.get("kind") == "adapter":
        raise InputError(f"{source.label} is an adapter that was trained; {_training(document)}")


def _training(document: Mapping[str, Any]) -> str:
    """The command that repeats a training."""
    command = document["trained"].get("command") or ["..."]
    return (
        "training is not repeated here, since it depends on hardware; the command recorded is: "
        + shlex.join(["surgery", *map(str, command)])
    )


def _check_present(found: _Published) -> None:
    """Compare the figures beside a manifest without weights; others of its files may be parts of a download."""
    entries = found.manifest["files"].items()
    here = {name: entry for name, entry in entries if name == provenance.TENSORS}
    if (found.folder / provenance.TENSORS).is_file():
        verification.check_named(found.folder, here)


def _check_listed(found: _Published, listed: Mapping[str, RemoteFile]) -> None:
    """Compare what the Hub says of large files with the manifest beside them: that needs no download."""
    for name, sha256 in found.files.items() if listed else ():
        if name not in listed:
            raise CheckError(f"{found.source.label} has no {name}, which its manifest lists")
        if (stated := listed[name].sha256) is not None and stated != sha256:
            raise CheckError(
                f"{name} of {found.source.label} is not the file its manifest describes; it was changed after the run"
            )


def _planned(published: _Published, output: Path, inputs: Mapping[str, str | Path], stack: ExitStack) -> Job:
    """The run, planned again; what stands in its way said so that it can be cured."""
    manifest, given = published.manifest, dict(inputs)
    if unknown := sorted(given.keys() - manifest["inputs"].keys()):
        raise UsageError(
            f"{published.source.label} has no input {unknown[0]!r}; it has {', '.join(manifest['inputs'])}"
        )
    if kept := verification.kept_adapter(published.folder, manifest):
        given.setdefault("adapter", kept)
    given = {role: _as_called(source, role, manifest, stack) for role, source in given.items()}
    try:
        return verification.repeated(published.folder, manifest, output=output, given=given)
    except InputError as error:
        if manifest.get("trained") and "adapter" not in given:
            raise InputError(
                f"{published.source.label} was made from an adapter that does not lie beside it; --input "
                f"adapter=SOURCE says where it is. It comes from training, and {_training(manifest)} --keep-adapter"
            ) from None
        told = f"{error} (--input ROLE=SOURCE says where an input lies now: {', '.join(manifest['inputs'])})"
        raise InputError(told) from None


def _as_called(source: str | Path, role: str, manifest: Mapping[str, Any], stack: ExitStack) -> str | Path:
    """An input under the name that it had: figures of tensors say by it what they were made from."""
    name = manifest["inputs"][role]["source"]
    folder = Path(os.path.abspath(source))
    if not folder.is_dir() or folder.name == name or not name.strip(".") or {"/", ":"} & set(name):
        return source
    link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-"))) / name
    link.symlink_to(folder)
    return link


def _compared(published: _Published, job: Job, done: Outcome, kept: str | None) -> Reproduction:
    """What the files and tensors of a repeated edit have in common with the published ones."""
    again = verification.manifest_of(done.output)
    mine = {name: entry["sha256"] for name, entry in again["files"].items()}
    names = sorted(published.files.keys() | mine.keys())
    changed = tuple(name for name in names if published.files.get(name) != mine.get(name))
    notes: list[str] = []
    found = list(_differing(published, job, done, changed, notes))
    tensors = {one.name: one.reason or EQUIVALENT for one in found}
    beside = [name for name in changed if not name.endswith(_WEIGHTS) and name != provenance.TENSORS]
    notes[:0] = [f"{name} is another file" for name in beside]
    verdict: Verdict = "equivalent" if changed else "identical"
    if beside or any(one.reason for one in found):
        verdict = "different"
    environment = _environment(published, again, done.output, same=verdict == "identical")
    return Reproduction(
        published.source.label, verdict, len(names), changed, tensors, environment, tuple(notes), kept
    )


def _differing(
    published: _Published, job: Job, done: Outcome, changed: Sequence[str], notes: list[str]
) -> Iterator[Difference]:
    """Every tensor that differs, as far as files differ."""
    weights = [name for name in changed if name.endswith(_WEIGHTS)]
    if provenance.TENSORS in changed:
        yield from _figures(published, done.records, notes)
    if not weights:
        return
    if not published.whole():
        source = published.source
        place = (
            f"`hf download {source.repository} --revision {source.commit}`" if source.repository else "them"
        )
        yield Difference(
            weights[0],
            f"{weights[0]} came out with another SHA-256; whether it is the same edit, rounded by other hardware, "
            f"can be told only beside the published weights: fetch {place} and run again",
        )
        return
    verification.check_files(published.folder, published.manifest)
    if job.options.as_lora:
        yield from equivalence.adapter_differences(published.folder, done.output, done.records)
    else:
        yield from _models(published.folder, job, done)


def _figures(published: _Published, records: Sequence[Record], notes: list[str]) -> Iterator[Difference]:
    """Compare what was done to each tensor; figures that differ are noted."""
    path = published.folder / provenance.TENSORS
    if not path.is_file():
        notes.append(f"{provenance.TENSORS} is not here and was not compared figure by figure")
        return
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    mine = [json.loads(json.dumps(record)) for record in records]
    if [record["name"] for record in told] != [record["name"] for record in mine]:
        yield Difference(provenance.TENSORS, f"{provenance.TENSORS} names other tensors")
        return
    for one, other in zip(told, mine, strict=True):
        if one["action"] != other["action"]:
            reason = f"{one['name']}: recorded is {one['action']!r}, and it came out as {other['action']!r}"
            yield Difference(one["name"], reason)
    apart = [one["name"] for one, other in zip(told, mine, strict=True) if one != other]
    if apart:
        notes.append(f"figures of {len(apart)} tensors differ in {provenance.TENSORS}, first {apart[0]}")


def _models(folder: Path, job: Job, done: Outcome) -> Iterator[Difference]:
    """Compare the tensors of two models, edited and copied."""
    records = {record["name"]: record for record in done.records}
    repeated = open_checkpoint(done.output, done.output.name)
    held = open_checkpoint(folder, folder.name).tensors
    if odd := sorted(held.keys() ^ repeated.tensors.keys()):
        yield Difference(odd[0], f"{odd[0]} is not in both models")
        return
    with Reader(repeated) as reader:

        def written(editor: AbstractEditor, step: Step) -> Edited:
            """The tensor that the repeated run has just stored."""
            record = records[step.name]
            return Edited(None if record["action"] == "unchanged" else reader.read(step.name), record)

        yield from equivalence.differences(folder, job, written)
    copies = [name for name, record in records.items() if record["action"] in ("copy", "unchanged")]
    for name in equivalence.changed_copies(folder, repeated, copies):
        yield Difference(name, f"{name} should be a copy of the {job.aligned.label} tensor and is not")


def _environment(
    published: _Published, again: Mapping[str, Any], output: Path, *, same: bool
) -> dict[str, dict[str, Any]]:
    """What may explain a difference: everything recorded of the machine and its software that is another here."""
    recorded = _machine(published.manifest, verification.account(published.folder))
    here = _machine(again, verification.account(output))
    if same and recorded[_CAPABILITY] is None:
        # Pushed outputs do not say it, and where the bytes are the same nobody needs to know.
        del recorded[_CAPABILITY], here[_CAPABILITY]
    return {
        name: {"recorded": recorded.get(name), "here": here.get(name)}
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    }


def _machine(manifest: Mapping[str, Any], account: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, threads, kernels and processor by name."""
    known = {**manifest.get("versions", {}), **manifest.get("backends", {})}
    return {**known, "threads": manifest.get("threads"), _CAPABILITY: account.get(_CAPABILITY)}
