"""From what a user names (a folder, a Hub repository, the embedded pair) to a local folder, pinned.

The only file that talks to the Hugging Face Hub.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from surgery import demo
from surgery.errors import AccessError, InputError, UsageError

_REPOSITORY = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_NEVER_FETCHED = [
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.pt",
    "*.pth",
    "original/*",
    "onnx/*",
    "consolidated*",
]


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

    A folder that exists wins over a repository of the same name.

    Raises:
        UsageError: No known form.
        InputError: There is no such folder or embedded model.
        AccessError: The Hub, the network or the rights do not allow it.
    """
    text = str(source)
    if text.startswith("demo:"):
        return Source(text, demo.folder(text.removeprefix("demo:")))
    path = Path(source).expanduser()
    if not text.startswith("hf://") and path.exists():
        if not path.is_dir():
            raise InputError(f"{text} is a file; a folder with a model is needed")
        return Source(path.absolute().name, path)
    found = _REPOSITORY.fullmatch(text)
    if found is None:
        raise InputError(
            f"there is no folder {text}; give a folder, ORG/NAME[@REVISION], demo:base or demo:aligned"
        )
    return _download(found["repo"], found["revision"], allow_pickle=allow_pickle)


def _download(repository: str, revision: str | None, *, allow_pickle: bool) -> Source:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repository}@{revision}" if revision else repository
    ignored = _NEVER_FETCHED if allow_pickle else [*_NEVER_FETCHED, "*.bin"]
    try:
        folder = Path(snapshot_download(repository, revision=revision, ignore_patterns=ignored))
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        raise AccessError(
            f"{where} is gated; accept its terms at {page} and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise AccessError(
            f"{repository} has no revision {revision}; check the branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise AccessError(
            f"there is neither a folder {where} here nor such a repository on the Hub that you may read; "
            "check the name, or log in with `hf auth login`"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{where} is no valid repository name: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise AccessError(f"{where} could not be fetched from the Hub ({first}); check the network") from None
    return Source(f"{repository}@{folder.name}", folder, repository, folder.name)
