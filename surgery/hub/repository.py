"""The files of a model on the Hub: listed, pinned to a commit, and brought into the cache of the Hub's client."""

import glob
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery import __version__, resources
from surgery.checkpoint.jsontext import json_object
from surgery.checkpoint.layout import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, choose_format
from surgery.checkpoint.reading import read_text
from surgery.errors import AccessError, InputError, ResourceError
from surgery.hub.refusals import check_endpoint, host, patience, plain_errors
from surgery.hub.source import RemoteFile, Source

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

Weights = Literal["fetch", "defer", "stream"]
"""What becomes of weights that are on the Hub: `surgery.hub.resolve` says what each means."""

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
# What makes up an adapter of PEFT.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

_TIMEOUT = 10.0
_WAITS = (1.0, 4.0)


@dataclass(frozen=True)
class _Listing:
    """What the Hub says of a repository at a revision.

    Attributes:
        commit: What the revision means now.
        files: By name.
    """

    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Repository:
    """A model on the Hub at a revision, which is the default branch where it is None."""

    name: str
    revision: str | None
    allow_pickle: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def source(self, weights: Weights, *, remember: str | None = None) -> Source:
        """Its files in the cache, fetched where they are not there yet and are to be.

        Args:
            weights: What to do with weights that are not in the cache.
            remember: The branch or tag to note in the cache as the commit's; by default the revision.

        Raises:
            InputError: It holds no weights that can be used, or pickles that are to be streamed.
            ResourceError: The files do not fit on the disk of the cache.
            AccessError: The Hub, the network or the rights do not allow it.
        """
        check_endpoint()
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            left: tuple[RemoteFile, ...] = ()
            folder = self._cached()
        else:
            folder, left = self._fetched(weights, remember or self.revision or "main")
        return Source(f"{self.name}@{folder.name}", folder, self.name, folder.name, self.revision, left)

    def _fetched(self, weights: Weights, ref: str) -> tuple[Path, tuple[RemoteFile, ...]]:
        """The snapshot of the commit the revision means now, and the weight files that are not in it."""
        with plain_errors(self, begun=False):
            listing = self._listing()
        label = f"{self.name}@{listing.commit}"
        kind, indexed = choose_format(set(listing.files), label, allow_pickle=self.allow_pickle)
        if kind == "pickle" and weights == "stream":
            raise InputError(
                f"{label} has pickled weights, which cannot be streamed; run without --stream, or convert them"
            )
        names = {SINGLE if kind == "safetensors" else PICKLE_SINGLE}
        with plain_errors(self, begun=True):
            if indexed:
                names = self._indexed(INDEX if kind == "safetensors" else PICKLE_INDEX, listing.commit)
            names &= set(listing.files)
            here = weights == "fetch" or kind == "pickle" or self._have(names, listing.commit)
            folder = self._snapshot(listing, _needed(listing.files, names if here else set()))
        if here:
            _remember(folder, ref)
            return folder, ()
        return folder, tuple(listing.files[name] for name in sorted(names))

    def adapter(self) -> Source:
        """The files of the adapter that it holds, in the cache, fetched where they are not there yet.

        Raises:
            InputError: It holds none in safetensors.
            ResourceError: The files do not fit on the disk of the cache.
            AccessError: The Hub, the network or the rights do not allow it.
        """
        check_endpoint()
        from huggingface_hub import constants, snapshot_download

        with plain_errors(self, begun=False):
            if constants.HF_HUB_OFFLINE:
                found = snapshot_download(
                    self.name, revision=self.revision, local_files_only=True, allow_patterns=list(_ADAPTER)
                )
                folder = Path(found)
            else:
                listing = self._listing()
                self._require_adapter(listing)
                folder = self._snapshot(listing, list(_ADAPTER))
                _remember(folder, self.revision or "main")
        return Source(f"{self.name}@{folder.name}", folder, self.name, folder.name, self.revision)

    def _require_adapter(self, listing: _Listing) -> None:
        lacking = [name for name in _ADAPTER if name not in listing.files]
        if lacking:
            pickled = "adapter_model.bin" in listing.files
            raise InputError(
                f"{self.name}@{listing.commit} has no {lacking[0]}, which an adapter needs"
                + ("; its adapter_model.bin is a pickle, which can hide code: save it again with PEFT" if pickled else
                   "; give the repository of a PEFT adapter")
            )  # fmt: skip

    def _snapshot(self, listing: _Listing, files: list[str]) -> Path:
        """The cached folder with these files, fetched where they are not there yet."""
        from huggingface_hub import snapshot_download

        self._require_space({file: listing.files[file].size for file in files}, listing.commit)
        found = snapshot_download(
            self.name,
            revision=listing.commit,
            # Without any pattern everything would be fetched.
            allow_patterns=[glob.escape(file) for file in files] or [""],
            tqdm_class=_bars(),
            library_name="surgery",
            library_version=__version__,
        )
        # Where the listing cannot be had a second time, the client is content with what it has.
        if lacking := [file for file in files if not (Path(found) / file).is_file()]:
            raise AccessError(f"the download of {self} broke off at {lacking[0]}; run the command again")
        return Path(found)

    def _listing(self) -> _Listing:
        """The commit a revision means, and every file in it."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="surgery", library_version=__version__)
        found = _patiently(
            lambda: api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=_TIMEOUT)
        )
        if found is None or not _COMMIT.fullmatch(commit := found.sha or ""):
            raise AccessError(f"{host()} does not answer as a Hub does, asked for {self}; check HF_ENDPOINT")
        files = (_listed(self.name, commit, entry) for entry in found.siblings or ())
        return _Listing(commit, {file.name: file for file in files})

    def _indexed(self, index: str, commit: str) -> set[str]:
        """The files that an index names."""
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(self.name, index, revision=commit)
        return _indexed(Path(path), f"{self.name}@{commit}/{index}")

    def _missing(self, names: Iterable[str], commit: str) -> list[str]:
        """Those of these files that the cache does not hold."""
        from huggingface_hub import try_to_load_from_cache

        return [
            name for name in names
            if not isinstance(try_to_load_from_cache(self.name, name, revision=commit), str)
        ]  # fmt: skip

    def _have(self, names: set[str], commit: str) -> bool:
        return bool(names) and not self._missing(names, commit)

    def _require_space(self, sizes: Mapping[str, int], commit: str) -> None:
        """Refuse a download that the disk of the cache cannot hold."""
        from huggingface_hub import constants

        missing = sum(sizes[name] for name in self._missing(sizes, commit))
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
        with plain_errors(self, begun=False):
            found = snapshot_download(
                self.name, revision=self.revision, local_files_only=True, ignore_patterns=ignored
            )
        folder = Path(found)
        if lacking := _lacking(folder, f"{self.name}@{folder.name}", allow_pickle=self.allow_pickle):
            raise AccessError(f"the cached copy of {self} has no {lacking}; unset HF_HUB_OFFLINE to fetch it")
        return folder


def _listed(repository: str, commit: str, entry: "RepoSibling") -> RemoteFile:
    """A file as the Hub lists it."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(
        repository, commit, entry.rfilename, entry.size or 0, sha256 or entry.blob_id or "", sha256
    )


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
            pause = patience(error.response.status_code, error.response.headers, wait or 0.0)
            if wait is None or pause is None:
                raise
            time.sleep(pause)
        except (HFValidationError, UnicodeEncodeError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            # A login page or some other service: what it sent could not be taken apart.
            return None
    return None
