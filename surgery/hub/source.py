"""A resolved model source, and weight files that are still on the Hub."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at a commit, as the Hub lists it.

    Attributes:
        repository: `ORG/NAME`.
        commit: 40 hexadecimal digits.
        name: Its path in the repository.
        size: Bytes.
        etag: How the Hub tells its content from another: SHA-256 of a large file, git's hash of a small one.
        sha256: Of its content as the Hub states it; None where it states none (files that are not LFS).
    """

    repository: str
    commit: str
    name: str
    size: int
    etag: str
    sha256: str | None


@dataclass(frozen=True)
class Source:
    """One resolved model source.

    Attributes:
        label: How the source is called in messages, manifests and cards; never an absolute path.
        folder: Where its files are; those in `weights` are not there.
        repository: `ORG/NAME` on the Hub, None otherwise.
        commit: The commit a Hub source is pinned to, None otherwise.
        revision: The branch, tag or commit a Hub source was asked for by; None for the default branch.
        weights: Weight files that were left on the Hub; empty where all files are in the folder.
    """

    label: str
    folder: Path
    repository: str | None = None
    commit: str | None = None
    revision: str | None = field(default=None, compare=False)
    weights: tuple[RemoteFile, ...] = ()
