"""Which files beside the weights go with an edited checkpoint, and which stay behind and why."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint.layout import INDEX, PICKLE_INDEX, Checkpoint
from surgery.checkpoint.reading import reading, shown
from surgery.errors import AccessError

_WEIGHTS = "another weight format: it would ship the unedited weights"
_OUTSIDE = "weights that are not part of the checkpoint"
_ADAPTER = "an adapter's settings: transformers would load the adapter on top"
_WEIGHT_INDEX = "the index of weights that are left behind"
_TRAINING = "the state of a training run"
_SIGNATURE = "a signature of the unedited checkpoint"
_RECORD = "the record of an earlier edit: linked as an ancestor"
_CARD = "the model card is written anew"
_HIDDEN = "hidden: settings, caches and secrets are not published"
_LINK = "a link to a folder"
_UNKNOWN = "not a kind that is carried"

# First match decides. Names in lower case; a folder's name ends in "/".
_LEFT = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"\..*", _HIDDEN),
        (r"readme\.md", _CARD),
        (r"surgery\.(json|run\.json|tensors\.jsonl)", _RECORD),
        (r".*\.(sig|sigstore|asc|p7s)", _SIGNATURE),
        (r"adapter_config\.json", _ADAPTER),
        (
            r"training_args\.(bin|json)|trainer_state\.json|(optimizer|scheduler|rng_state|scaler)[^/]*(?<!\.py)",
            _TRAINING,
        ),
        (r"(checkpoint-\d.*|global_step\d.*|runs|wandb|mlruns|logs)/|.*tfevents.*", _TRAINING),
        (r".*\.(safetensors|bin|h5|msgpack)\.index.*\.json", _WEIGHT_INDEX),
        (r".*\.safetensors", _OUTSIDE),
        (
            r".*\.(bin|gguf|ggml|onnx|onnx_data|pt|pth|h5|msgpack|ckpt|npz|npy|pkl|pickle|tflite|mlmodel)",
            _WEIGHTS,
        ),
        (r"consolidated.*|(original|onnx|openvino|coreml|gguf)/", _WEIGHTS),
        (r"__pycache__/|.*\.pyc", _UNKNOWN),
    )
)

_CARRIED_ANYWHERE = re.compile(
    r".*\.py"
    r"|(.*[ ._-])?(licen[cs]es?|notices?|copying|eula|use[ ._-]?policy|acceptable[ ._-]?use)"
    r"([ _-][\w -]+)?(\.(txt|md|rst|html|pdf|\d+))*"
)
_CARRIED_AT_TOP = re.compile(
    r"(config|configuration|generation_config|chat_template|(\w+_)?(pre)?processor_config"
    r"|feature_extractor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|(\w+_)?vocab|normalizer|tekken)\.json"
    r"|.*\.(jinja|tiktoken|spm)|(\w+_)?vocab[\w-]*\.(txt|bpe)|merges\.txt|bpe\.codes|dict\.txt"
    r"|(.*[._-])?(tokenizer|tiktoken|spiece|sentencepiece|bpe|spm|ice_text)\.model(\.v\w+)?"
)
_CARRIED_BELOW = re.compile(r"additional_chat_templates/[^/]*\.jinja")


@dataclass(frozen=True)
class Sidecars:
    """The files of a checkpoint's folder that are neither its shards nor its index.

    Attributes:
        carried: To be copied byte for byte; relative, "/" between folders, sorted.
        left: File or folder (its name ends in "/") and the reason why it stays behind, sorted.
    """

    carried: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def _last(relative: str) -> str:
    """The last part of a name, with the "/" that marks a folder."""
    return relative[relative.rstrip("/").rfind("/") + 1 :]


def _reason(name: str) -> str | None:
    """Why a file or folder of this last name is always left behind, None if it is not."""
    return next((reason for pattern, reason in _LEFT if pattern.fullmatch(name.lower())), None)


def _is_carried(relative: str) -> bool:
    name = _last(relative).lower()
    if _CARRIED_ANYWHERE.fullmatch(name) or _CARRIED_BELOW.fullmatch(relative.lower()):
        return True
    return name == relative.lower() and _CARRIED_AT_TOP.fullmatch(name) is not None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads to itself: no folder, and an error only if it is a file to carry.
        return False


def _scan(folder: Path, label: str, below: str) -> list[tuple[str, bool, bool]]:
    """Relative name, is a folder, is a link: of everything in one folder."""
    with reading(f"{label}/{shown(below)}".rstrip("/")), os.scandir(os.path.join(folder, below)) as found:
        return [(below + entry.name, _is_folder(entry), entry.is_symlink()) for entry in found]


def _entries(folder: Path, label: str) -> Iterator[tuple[str, bool]]:
    """Files, and folders that are left behind whole, by relative name, and whether it is a link to a folder.

    Folders that are always left behind and links to folders are not entered, so that no loop is followed.
    """
    waiting = [""]
    while waiting:
        for relative, is_folder, is_link in _scan(folder, label, waiting.pop()):
            if not is_folder:
                yield relative, False
            elif is_link or _reason(_last(f"{relative}/")):
                yield f"{relative}/", is_link
            else:
                waiting.append(f"{relative}/")


def _check_readable(path: Path, label: str) -> bool:
    """Whether a file that is carried is a regular one; links are followed.

    Raises:
        InputError: It is a link to nothing.
        AccessError: There is no right to read it.
    """
    with reading(label):
        regular = stat.S_ISREG(path.stat().st_mode)
    if regular and not os.access(path, os.R_OK):
        raise AccessError(f"no right to read {label}; change its permissions, or run as its owner")
    return regular


def _decide(folder: Path, label: str, relative: str, is_link: bool) -> str | None:
    """Why an entry is left behind, None if it is carried."""
    if is_link:
        return _LINK
    if not relative.isprintable():
        return _UNKNOWN
    reason = _reason(_last(relative))
    if reason or not _is_carried(relative):
        return reason or _UNKNOWN
    return None if _check_readable(folder / relative, f"{label}/{relative}") else "not a regular file"


def _listed(relative: str) -> str:
    """A name that can stand in a document: what is no UTF-8 is written as escapes."""
    return relative if relative.isprintable() else ascii(relative)[1:-1]


def list_sidecars(checkpoint: Checkpoint) -> Sidecars:
    """What is carried from a checkpoint's folder beside its weights, and what stays; nothing is read.

    Raises:
        InputError: A file to carry is a link to nothing.
        AccessError: There is no right to list a folder or to read a file to carry.
    """
    own = {shard.name for shard in checkpoint.shards}
    if checkpoint.sharded:
        own.add(INDEX if checkpoint.shards[0].kind == "safetensors" else PICKLE_INDEX)
    carried, left = [], []
    for relative, is_link in _entries(checkpoint.folder, checkpoint.label):
        if relative in own:
            continue
        reason = _decide(checkpoint.folder, checkpoint.label, relative, is_link)
        if reason is None:
            carried.append(relative)
        else:
            left.append((_listed(relative), reason))
    return Sidecars(tuple(sorted(carried)), tuple(sorted(left)))
