"""Is an output what its manifest says, and does the edit come out the same when it is repeated?"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from surgery import equivalence, methods, provenance
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.reader import file_sha256
from surgery.checkpoint.staging import MANIFEST
from surgery.errors import CheckError, InputError, SurgeryError
from surgery.hub import Source, fetch, resolve
from surgery.hub.remote import open_source
from surgery.job import Job, prepare
from surgery.merging import prepare as prepare_merge
from surgery.options import Options

# The roles of the checkpoint that adapters were merged into, and of the one that training came to.
_ROLE, _ADAPTER = "model", "adapter"
_NOT_COMPARED = "copied tensors were not compared with their source"

NOT_GIVEN: Mapping[str, str | Path] = MappingProxyType({})
"""No input is said to lie anywhere else than where the manifest and the run say."""

# What a loader of models would read or run, if it lay in the folder.
_LOADED = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"))

Verdict = Literal["identical", "equivalent"]


@dataclass(frozen=True)
class Verification:
    """What a verification found; one that fails raises instead.

    Attributes:
        files: Output files whose SHA-256 agrees with the manifest.
        copied: Copied tensors that were compared with their source; None where it could not be reached.
        recomputed: "identical" or "equivalent" when the edit was repeated, else None.
        notes: What could not be checked and why, or what differs within the bounds.
    """

    files: int
    copied: int | None
    recomputed: Verdict | None
    notes: tuple[str, ...]


def verify(folder: str | Path, *, recompute: bool = False, strict: bool = False) -> Verification:
    """Check an output against its manifest.

    Args:
        folder: What `apply` wrote.
        recompute: Also repeat the edit from the sources.
        strict: Let only identical bytes pass when the edit is repeated. Other hardware and other thread counts
            give results that differ in the last place, which otherwise pass as "equivalent".

    Raises:
        InputError: There is no manifest, or the sources are needed and not there.
        CheckError: A file or tensor is not what the manifest says.
    """
    # Absolute: `.` has no name, and what is read beside the folder goes by it.
    folder = Path(os.path.abspath(folder))
    manifest = manifest_of(folder)
    check_files(folder, manifest)
    notes: list[str] = []
    job = _job(folder, manifest, required=recompute, notes=notes)
    adapter = manifest["options"]["as_lora"]
    verdict = None
    if recompute and job is not None:
        if adapter:
            raise InputError(f"{folder} is an adapter; --recompute repeats edits of models only")
        verdict = _recompute(folder, job, strict=strict, notes=notes)
    count = None
    if job is not None and not adapter:
        count = _check_copied(folder, job.aligned, _unedited(folder, job))
    elif job is None and _ROLE in manifest["inputs"]:
        count = _check_without_adapters(folder, manifest, notes)
    return Verification(len(manifest["files"]), count, verdict, tuple(notes))


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of an output.

    Raises:
        InputError: There is none, or it cannot be used.
    """
    try:
        document = provenance.read_manifest(folder)
        document["files"], document["inputs"], document["options"]["as_lora"], document["method"]
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST}; verify checks folders that surgery wrote") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{folder / MANIFEST} cannot be read ({error}); restore it from where it was published"
        ) from None
    if document.get("schema") != provenance.SCHEMA:
        raise InputError(
            f"{folder / MANIFEST} has schema {document.get('schema')}; this version reads {provenance.SCHEMA}"
        )
    return document


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file of an output with its manifest.

    Raises:
        CheckError: One is missing or another, or there are weights or code that the manifest does not name.
    """
    check_named(folder, manifest["files"])
    loaded = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _LOADED}
    if extra := sorted(loaded - manifest["files"].keys()):
        raise CheckError(
            f"{extra[0]} in {folder} is not in the manifest; weights or code were added after the run"
        )


def check_named(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare files of an output with what the manifest says of them.

    Raises:
        CheckError: One is missing or another.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckError(f"{name} is missing from {folder}; the manifest lists it")
        if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
            raise CheckError(
                f"{name} in {folder} is not the file the manifest describes; it was changed or damaged"
            )


def _sources(
    folder: Path, manifest: Mapping[str, Any], given: Mapping[str, str | Path] = NOT_GIVEN
) -> dict[str, str | Path]:
    """Where each input can be had: as given, kept beside the output, pinned, embedded, or where the run had it."""
    sources = account(folder).get("sources")
    known = sources if isinstance(sources, dict) else {}
    found: dict[str, str | Path] = {}
    kept = {_ADAPTER: beside} if (beside := kept_adapter(folder, manifest)) else {}
    for role, entry in manifest["inputs"].items():
        pinned = f"hf://{entry['repository']}@{entry['commit']}" if entry["repository"] else None
        embedded = entry["source"] if entry["source"].startswith("demo:") else None
        found[role] = kept.get(role) or pinned or embedded or known.get(role, entry["source"])
    return found | dict(given)


def kept_adapter(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The adapter that training left beside its output, where it was kept."""
    beside = folder.with_name(f"{folder.name}-{_ADAPTER}")
    return beside if manifest.get("trained") and beside.is_dir() else None


def _require_kept(adapter: str | Path) -> None:
    """Refuse where training left nothing that the edit could be made from again."""
    if not str(adapter).startswith("hf://") and not Path(adapter).is_dir():
        raise InputError(
            "the adapter that its training came to was not kept; the same command with --keep-adapter keeps it"
        )


def account(folder: Path) -> dict[str, Any]:
    """What an output says of the run that made it (`surgery.run.json`); empty where that cannot be read."""
    try:
        document = json.loads((folder / provenance.RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _planned(manifest: Mapping[str, Any], sources: dict[str, str | Path], output: Path, trained: Any) -> Job:
    """The run that a manifest describes, planned from these sources."""
    values = dict(manifest["options"])
    run = {key: values.pop(key) for key in ("rounding", "dtype", "as_lora", "seed")}
    # The order was checked, or vouched for, when the output was made.
    options = Options(**run, i_checked_the_order=True, allow_pickle=True)
    if _ROLE in sources:
        model = sources.pop(_ROLE)
        adapters, weights = list(sources.values()), values["weights"]
        return prepare_merge(
            model, adapters, weights=weights, output=output, options=options, trained=trained
        )
    method: Any = methods.get(manifest["method"])
    named = sources["base"], sources["aligned"]
    return prepare(method(**values), base=named[0], model=named[1], output=output, options=options)


def repeated(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    output: Path | None = None,
    given: Mapping[str, str | Path] = NOT_GIVEN,
) -> Job:
    """The run that made an output, planned again from the very inputs that its manifest names.

    Args:
        folder: Where the manifest lies.
        manifest: What `manifest_of` found there.
        output: What the run would write, if it were carried out.
        given: Where inputs lie now, by role; the others are looked for where the manifest and the run say.

    Raises:
        InputError: An input is gone or another one, or the manifest describes no run.
        AccessError: The Hub, the network or the rights do not allow it.
    """
    sources = _sources(folder, manifest, given)
    if manifest.get("trained") and _ADAPTER not in given:
        _require_kept(sources.get(_ADAPTER, folder))
    try:
        job = _planned(manifest, sources, output or folder.with_name(".verify"), manifest.get("trained"))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MANIFEST} describes no run of this version ({error}); it was changed, or made by another"
        ) from None
    for source in job.sources.values():
        fetch(source)
    _require_same_inputs(job, manifest)
    return job


def _job(folder: Path, manifest: Mapping[str, Any], *, required: bool, notes: list[str]) -> Job | None:
    """The run that made the output, planned again; None where its sources are not what they were."""
    try:
        return repeated(folder, manifest)
    except SurgeryError as error:
        if required:
            raise
        notes.append(f"{_NOT_COMPARED}: {error}")
        return None


def _require_same_inputs(job: Job, manifest: Mapping[str, Any]) -> None:
    for role, checkpoint in job.checkpoints.items():
        _require_same_files(role, checkpoint, manifest)
    if job.identity().get("settings") != manifest.get("settings"):
        raise InputError(
            "adapter_config.json is not the file the manifest names; put the original in its place"
        )


def _require_same_files(role: str, checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> None:
    for shard in checkpoint.shards:
        expected = manifest["inputs"][role]["files"].get(shard.name, {}).get("sha256")
        if file_sha256(shard.path) != expected:
            raise InputError(
                f"{shard.name} of the {role} checkpoint is not the file the manifest names; "
                "put the original in its place"
            )


def _edited(folder: Path) -> set[str]:
    """Tensors that the output's figures say were edited."""
    lines = (folder / provenance.TENSORS).read_text(encoding="utf-8").splitlines()
    return {record["name"] for record in map(json.loads, lines) if record["action"] in ("edit", "scale")}


def _unedited(folder: Path, job: Job) -> list[str]:
    """Tensors that are copies: planned so, or left unchanged by alignment."""
    edited = _edited(folder)
    return [step.name for step in job.plan.steps.values() if step.action == "copy" or step.name not in edited]


def _check_copied(folder: Path, aligned: Checkpoint, names: Sequence[str]) -> int:
    """Compare copied tensors with the checkpoint that was edited; return how many there are."""
    for name in equivalence.changed_copies(folder, aligned, names):
        raise CheckError(f"{name} should be a copy of the {aligned.label} tensor and is not")
    return len(names)


def _check_without_adapters(folder: Path, manifest: Mapping[str, Any], notes: list[str]) -> int | None:
    """Compare copied tensors with the model alone: adapters that a training left may be gone."""
    try:
        source: Source = resolve(_sources(folder, manifest)[_ROLE], allow_pickle=True)
        model = open_source(source, allow_pickle=True)
        _require_same_files(_ROLE, model, manifest)
    except SurgeryError:
        return None
    notes[:] = [f"the edit cannot be repeated: {note.removeprefix(_NOT_COMPARED + ': ')}" for note in notes]
    edited = _edited(folder)
    return _check_copied(folder, model, [name for name in model.tensors if name not in edited])


def _recompute(folder: Path, job: Job, *, strict: bool, notes: list[str]) -> Verdict:
    """Repeat every edit and compare with the stored tensor.

    Raises:
        CheckError: A tensor differs by more than the certificates allow, or at all under `strict`.
    """
    differing = []
    for one in equivalence.differences(folder, job):
        if one.reason:
            raise CheckError(one.reason)
        differing.append(one.name)
    if differing and strict:
        raise CheckError(
            f"{differing[0]} is equivalent, not identical ({len(differing)} such tensors), and --strict is on"
        )
    if differing:
        notes.append(
            f"{len(differing)} tensors differ in the last place, within their certificates, first {differing[0]}; "
            "other hardware and thread counts give this"
        )
    return "equivalent" if differing else "identical"
