"""Rows to train on: from a file, a data set of the Hub or the embedded pair, checked and identified.

A row is a conversation that ends with the response to be learnt. Everything that cannot be used as it is is refused
by number: no column is guessed and no row left out.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery import demo
from surgery.checkpoint.reading import reading
from surgery.errors import AccessError, InputError, UsageError

Message = Mapping[str, str]
Conversation = tuple[Message, ...]

_FORMS = "a .jsonl, .json, .csv or .parquet file, ORG/DATASET[:SPLIT], or demo:NAME"
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%+-]+))?")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Columns:
    """Which columns hold a row's text; None for `prompt` and `response`, or `messages` where those are absent."""

    prompt: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Identity:
    """What data was used, for the manifest.

    Attributes:
        source: As the user named it; of a file its name only.
        rows: How many.
        sha256: Of the file, or of the rows as JSON where there is no one file.
    """

    source: str
    rows: int
    sha256: str

    def document(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in its order, and which they are."""

    conversations: tuple[Conversation, ...]
    identity: Identity


def read_rows(source: str | Path, columns: Columns = Columns()) -> Rows:
    """The rows of a source: a file, `ORG/DATASET[:SPLIT]`, or `demo:NAME[:PART]`.

    Without SPLIT or PART it is the one called `train`.
    A row has the columns `prompt` and `response`, or `messages` (a list of `role` and `content`, the last of the
    assistant), or those that `columns` names.

    Raises:
        InputError: There is no such data, or its first unusable row is named.
        UsageError: No known form.
        AccessError: The Hub or the network does not allow it.
    """
    text = str(source)
    label, records, digest = _records(text)
    conversations = tuple(
        _conversation(record, number, label, columns) for number, record in enumerate(records, 1)
    )
    if not conversations:
        raise InputError(f"{label} has no rows; give data with at least one")
    digest = digest or hashlib.sha256(json.dumps(conversations, sort_keys=True).encode()).hexdigest()
    return Rows(conversations, Identity(label, len(conversations), digest))


def _records(text: str) -> tuple[str, Iterator[Any], str]:
    """Label, raw rows and, of a file, SHA-256."""
    if text.startswith("demo:"):
        name, _, part = text.removeprefix("demo:").partition(":")
        path = demo.data_file(name, part or "train")
        return text, iter(_json_lines(path, text)), _sha256(path)
    path = Path(text).expanduser()
    if path.suffix.lower() in _READERS:
        with reading(text):
            if not path.is_file():
                raise InputError(f"there is no file {text}; give {_FORMS}")
            return path.name, iter(_READERS[path.suffix.lower()](path, path.name)), _sha256(path)
    if (found := _DATASET.fullmatch(text)) is None:
        raise UsageError(f"{text!r} names no data; give {_FORMS}")
    return text, iter(_hub_rows(found["name"], found["split"] or "train")), ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_lines(path: Path, label: str) -> list[Any]:
    with path.open(encoding="utf-8") as lines:
        try:
            return [_parsed(line, label, number) for number, line in enumerate(lines, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{label} is no UTF-8 text ({error.reason}); save it as UTF-8") from None


def _parsed(line: str, label: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{label}, line {number} is no JSON ({error}); a row is needed on each line"
        ) from None


def _json(path: Path, label: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{label} is no JSON ({error}); a list of rows is needed") from None
    if not isinstance(found, list):
        raise InputError(f"{label} holds {type(found).__name__}, and a list of rows is needed; save one")
    return found


def _csv(path: Path, label: str) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return list(csv.DictReader(file, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{label} is no CSV in UTF-8 ({error}); save it again") from None


def _parquet(path: Path, label: str) -> list[Any]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).partition("\n")[0]
        raise InputError(f"{label} is no Parquet file ({what}); save it again") from None


_READERS: dict[str, Callable[[Path, str], list[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub_rows(name: str, split: str) -> Iterable[Any]:
    import datasets

    try:
        found: Iterable[Any] = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise AccessError(
            f"the Hub cannot be reached for {name} ({_first(error)}); check the network"
        ) from None
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{name}:{split} cannot be loaded ({_first(error)}); give {_FORMS}") from None
    return found


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _conversation(record: Any, number: int, label: str, columns: Columns) -> Conversation:
    where = f"{label}, row {number}"
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is no record of columns; give rows with prompt and response, or messages")
    asked = columns.prompt or columns.response
    if not asked and "messages" in record and not {"prompt", "response"} <= record.keys():
        return _messages(record["messages"], where)
    names = (columns.prompt or "prompt", columns.response or "response")
    if missing := [name for name in names if name not in record]:
        raise InputError(
            f"{where} has the columns {', '.join(map(str, record)) or 'none'} and not {' and '.join(missing)}; "
            "name yours by --prompt-column and --response-column"
        )
    prompt, response = (record[name] for name in names)
    if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
        raise InputError(f"{where} has no text in {names[0]} or {names[1]}; remove or complete it")
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": response}


def _messages(found: Any, where: str) -> Conversation:
    good = isinstance(found, Sequence) and bool(found) and all(_is_message(one) for one in found)
    if not good or found[-1]["role"] != "assistant" or not found[-1]["content"].strip():
        raise InputError(
            f"{where}: messages must be a list of role ({', '.join(_ROLES)}) and content, the last one the "
            "assistant's and not empty; correct or remove it"
        )
    return tuple({"role": one["role"], "content": one["content"]} for one in found)


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and one.get("role") in _ROLES and isinstance(one.get("content"), str)
