"""From what a user names (a folder, a Hub repository, the embedded pair) to a local folder, pinned.

The only file that talks to the Hugging Face Hub. Its client is imported when a source first needs it.
"""

import errno
import glob
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from surgery import __version__, demo, resources
from surgery.checkpoint.jsontext import json_object
from surgery.checkpoint.layout import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, choose_format
from surgery.checkpoint.reading import read_text, reading, shown
from surgery.errors import AccessError, InputError, ResourceError, SurgeryError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"\w(?!.*\.\.)(?:[\w.+#=,/-]*[\w+#=-])?"
_REPOSITORY = re.compile(rf"(?:hf://(?:models/)?)?(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?")
_FORMS = "a folder, ORG/NAME[@REVISION], demo:base or demo:aligned"
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What no edit reads and no output carries; everything else is small. Weights are chosen by name.
_NEVER_FETCHED = (
    *(f"*.{suffix}" for suffix in (
        "gguf", "ggml", "onnx", "onnx_data", "h5", "msgpack", "ot", "pt", "pth", "ckpt", "npz", "npy", "pkl",
        "pickle", "tflite", "mlmodel", "llamafile", "zip", "gz", "tar", "7z", "parquet", "arrow",
        "png", "jpg", "jpeg", "gif", "webp", "svg", "mp3", "mp4", "wav", "webm",
    )),
    *(f"{folder}/*" for folder in (
        "original", "onnx", "openvino", "coreml", "gguf", "runs", "wandb", "mlruns", "logs",
        "checkpoint-[0-9]*", "global_step[0-9]*",
    )),
    "consolidated*",
    ".*",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin")

_TIMEOUT = 10.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 4)
_LONGEST_WAIT = 30
_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s']+|(?<=//)[^/@\s]+(?=@)")


@dataclass(frozen=True)
class Source:
    """One resolved model source.

    Attributes:
        label: How the source is called in messages, manifests and cards; never an absolute path.
        folder: Where its files are.
        repository: `ORG/NAME` on the Hub, None otherwise.
        commit: The commit a Hub source is pinned to, None otherwise.
    """

    label: str
    folder: Path
    repository: str | None = None
    commit: str | None = None


def resolve(source: str | Path, *, allow_pickle: bool = False) -> Source:
    """The local files of a source: a folder, `demo:base`, `demo:aligned`, or `[hf://]ORG/NAME[@REVISION]`.

    A folder that exists wins over a repository of the same name; `hf://` always means the Hub. A branch or tag is
    resolved to its commit. Only the files an edit needs are fetched, into the cache of the Hub's client; under
    `HF_HUB_OFFLINE=1` they are taken from there and nothing is asked.

    Args:
        source: What the user named.
        allow_pickle: Fetch `pytorch_model*.bin` where there are no safetensors.

    Raises:
        UsageError: No known form.
        InputError: There is no such folder or embedded model, or the repository holds no weights that can be used.
        ResourceError: The files do not fit on the disk of the cache.
        AccessError: The Hub, the network or the rights do not allow it.
    """
    text = str(source)
    if not text:
        raise UsageError(f"a model's name is empty; give {_FORMS}")
    if text.startswith("demo:"):
        return Source(text, demo.folder(text.removeprefix("demo:")))
    named = _REPOSITORY.fullmatch(text)
    if text.startswith("hf://"):
        if named is None:
            raise UsageError(f"{text} names no model on the Hub; write hf://ORG/NAME[@REVISION]")
    elif (folder := _local(text)) is not None:
        return folder
    if named is None:
        raise InputError(f"there is no folder {text}; give {_FORMS}")
    return _Repository(named["repo"], named["revision"], allow_pickle).source()


def _local(text: str) -> Source | None:
    """The folder of that name, None where nothing has it."""
    with reading(text):
        path = Path(os.path.expanduser(text))
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not path.is_dir():
            raise InputError(f"{text} is a file or a link to nothing; a folder with a model is needed")
    return Source(shown(Path(os.path.abspath(path)).name or "root"), path)


@dataclass(frozen=True)
class _Repository:
    """A model on the Hub at a revision, which is the default branch where it is None."""

    name: str
    revision: str | None
    allow_pickle: bool

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def source(self) -> Source:
        """Its files in the cache, fetched where they are not there yet."""
        _check_endpoint()
        from huggingface_hub import constants

        folder = self._cached() if constants.HF_HUB_OFFLINE else self._fetched()
        return Source(f"{self.name}@{folder.name}", folder, self.name, folder.name)

    def _fetched(self) -> Path:
        """The snapshot of the commit the revision means now."""
        from huggingface_hub import hf_hub_download, snapshot_download

        with _plain_errors(self, begun=False):
            commit, sizes = self._listing()
        label = f"{self.name}@{commit}"
        kind, indexed = choose_format(set(sizes), label, allow_pickle=self.allow_pickle)
        with _plain_errors(self, begun=True):
            weights = {SINGLE if kind == "safetensors" else PICKLE_SINGLE}
            if indexed:
                index = INDEX if kind == "safetensors" else PICKLE_INDEX
                path = hf_hub_download(self.name, index, revision=commit)
                weights = _indexed(Path(path), f"{label}/{index}")
            files = _needed(sizes, weights)
            self._require_space({file: sizes[file] for file in files}, commit)
            found = snapshot_download(
                self.name,
                revision=commit,
                allow_patterns=[glob.escape(file) for file in files],
                tqdm_class=_bars(),
                library_name="surgery",
                library_version=__version__,
            )
        folder = Path(found)
        # Where the listing cannot be had a second time, the client is content with what it has.
        if lacking := [file for file in files if not (folder / file).is_file()]:
            raise AccessError(f"the download of {self} broke off at {lacking[0]}; run the command again")
        _remember(folder, self.revision or "main")
        return folder

    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit a revision means, and the size of every file in it."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="surgery", library_version=__version__)
        found = _patiently(
            lambda: api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=_TIMEOUT)
        )
        if found is None or not _COMMIT.fullmatch(found.sha or ""):
            raise AccessError(f"{_host()} does not answer as a Hub does, asked for {self}; check HF_ENDPOINT")
        return found.sha or "", {file.rfilename: file.size or 0 for file in found.siblings or ()}

    def _require_space(self, sizes: Mapping[str, int], commit: str) -> None:
        """Refuse a download that the disk of the cache cannot hold."""
        from huggingface_hub import constants, try_to_load_from_cache

        missing = sum(
            size
            for file, size in sizes.items()
            if not isinstance(try_to_load_from_cache(self.name, file, revision=commit), str)
        )
        free = resources.disk_free(Path(constants.HF_HUB_CACHE))
        if missing > free:
            raise ResourceError(
                f"{self} needs {missing / 2**30:.1f} GiB more in the cache {constants.HF_HUB_CACHE}, where "
                f"{free / 2**30:.1f} GiB are free; free some space, or set HF_HOME to a folder on a larger disk"
            )

    def _cached(self) -> Path:
        """The snapshot that the cache holds, complete."""
        from huggingface_hub import snapshot_download

        ignored = [*_NEVER_FETCHED, *_WEIGHTS]
        with _plain_errors(self, begun=False):
            found = snapshot_download(
                self.name, revision=self.revision, local_files_only=True, ignore_patterns=ignored
            )
        folder = Path(found)
        if lacking := _lacking(folder, f"{self.name}@{folder.name}", allow_pickle=self.allow_pickle):
            raise AccessError(f"the cached copy of {self} has no {lacking}; unset HF_HUB_OFFLINE to fetch it")
        return folder


def _check_endpoint() -> None:
    """Refuse an address of the Hub that is none: its client would fail while it is imported."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError("HF_ENDPOINT is no address of a Hub; write https://HOST[:PORT], or unset it")


def _indexed(path: Path, label: str) -> set[str]:
    """The files an index names; what is wrong with it is found when the checkpoint is opened."""
    mapped = json_object(read_text(path, label), label).get("weight_map")
    return {file for file in mapped.values() if isinstance(file, str)} if isinstance(mapped, dict) else set()


def _needed(names: Iterable[str], weights: set[str]) -> list[str]:
    """The files to fetch: these weights, and of the rest what is no weight and may be carried or read."""
    ignored = [*_NEVER_FETCHED, *_WEIGHTS]
    rest = {name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignored)}
    return sorted(rest | (weights & set(names)))


def _lacking(folder: Path, label: str, *, allow_pickle: bool) -> str | None:
    """A weight file that a snapshot should have and has not, None where it has all."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)):
        if index in names and (index == INDEX or allow_pickle):
            return min(_indexed(folder / index, f"{label}/{index}") - names, default=None)
        if index in names or single in names:
            return None
    return SINGLE


def _remember(folder: Path, revision: str) -> None:
    """Note in the cache which commit a branch or tag means, as its other users do: for offline runs by that name."""
    ref = folder.parents[1] / "refs" / revision
    # A cache that cannot be written is none the worse for this run, which has its files.
    with suppress(OSError):
        if revision != folder.name and (not ref.is_file() or ref.read_text() != folder.name):
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            fresh.write_text(folder.name)
            fresh.replace(ref)


def _bars() -> Any:
    """Progress bars that stay silent where nobody watches them."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bars(tqdm):
        def __init__(self, *values: Any, **named: Any) -> None:
            hidden = named.pop("disable", False) or not sys.stderr.isatty() or bool(os.environ.get("CI"))
            super().__init__(*values, disable=hidden, **named)

    return Bars


def _patiently(ask: "Callable[[], ModelInfo]") -> "ModelInfo | None":
    """The Hub's answer, asked again after passing trouble; None where it is no answer of a Hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for wait in (*_WAITS, None):
        try:
            return ask()
        except HfHubHTTPError as error:
            asked = error.response.headers.get("Retry-After", "")
            pause = int(asked) if asked.isdecimal() else 0
            if error.response.status_code not in _TRANSIENT or wait is None or pause > _LONGEST_WAIT:
                raise
            time.sleep(max(wait, pause))
        except (HFValidationError, UnicodeEncodeError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            # A login page or some other service: what it sent could not be taken apart.
            return None
    return None


@contextmanager
def _plain_errors(repository: _Repository, *, begun: bool) -> Iterator[None]:
    """A block in which what the Hub's client raises becomes an error in one line.

    Args:
        repository: What was asked for.
        begun: The Hub has answered before, so that failures of the network are those of a download.
    """
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OIDCError,
    )

    try:
        yield
    except SurgeryError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{repository} is no name of a repository: {_detail(error)}") from None
    except UnicodeEncodeError:
        raise AccessError(
            "the token for the Hub has letters no token has; correct HF_TOKEN or run `hf auth login`"
        ) from None
    except OIDCError as error:
        raise AccessError(f"no token could be had for {repository}: {_detail(error)}") from None
    except (HTTPError, OSError, ValueError) as error:
        # The client's own error says that nothing is cached either; what it met stands behind it.
        met = error if error.__cause__ is None or isinstance(error, HfHubHTTPError) else error.__cause__
        raise _explained(met, repository, begun=begun) from None


def _explained(error: BaseException, repository: _Repository, *, begun: bool) -> SurgeryError:
    """The error to show for one of the Hub's client."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return AccessError(_refusal(error.response.status_code, error.response.headers, repository))
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return AccessError(
            f"{_no_folder(repository)}HF_HUB_OFFLINE is set and the cache does not hold all of {repository}; unset "
            "it to fetch the rest"
        )
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (ResourceError if full else AccessError)(
            f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to a folder with "
            "enough room where you may write, and run the command again"
        )
    if begun:
        return AccessError(
            f"the download of {repository} broke off ({_detail(error)}); run the command again to go on: files that "
            "are complete are kept"
        )
    return AccessError(
        f"{_no_folder(repository)}{_host()} could not be reached for {repository} ({_detail(error)}); check the "
        "network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is cached"
    )


def _refusal(status: int, headers: Mapping[str, str], repository: _Repository) -> str:
    """What to say of an answer of the Hub that is no success; its error codes tell more than the status."""
    hub, code = _host(), headers.get("X-Error-Code")
    if code == "GatedRepo":
        return (
            f"{repository} is gated; accept its terms at {hub}/{repository.name} and log in with that account "
            "(`hf auth login`, or HF_TOKEN)"
        )
    if code == "RevisionNotFound":
        return f"{repository.name} has no revision {repository.revision or 'main'}; check the branch, tag or commit"
    if "Invalid credentials" in headers.get("X-Error-Message", ""):
        return f"{hub} does not know the token it was sent; run `hf auth login` again, or correct HF_TOKEN"
    if status in (401, 404):
        return (
            f"{_no_folder(repository)}{hub} has no model {repository.name} that you may read; check the name, or "
            "log in with `hf auth login`"
        )
    if status == 403:
        return f"{hub} does not let this token read {repository}; give it the right to read, or use another"
    if status == 429:
        return f"{hub} takes no more requests for now, asked for {repository}; try again later, or log in"
    return f"{hub} answered {status} when asked for {repository}; try again later"


def _no_folder(repository: _Repository) -> str:
    """How a message begins when what was named may have been meant as a folder."""
    return "" if os.path.lexists(str(repository)) else f"there is no folder {repository} here, and "


def _host() -> str:
    """The Hub's address, without what may be secret in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _detail(error: BaseException) -> str:
    """The first line of an error's text, without tokens and passwords."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token.strip(), "***")
    return _SECRET.sub("***", text)
