"""One file from the Hub onto disk: taken up where an earlier try broke off, hashed as it comes in."""

import hashlib
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from surgery.checkpoint.staging import writing
from surgery.errors import AccessError
from surgery.hub.answers import label_of
from surgery.hub.ranges import read_range
from surgery.hub.source import RemoteFile

_CHUNK = 1 << 20


def part_of(path: Path) -> Path:
    """What a file is called while it is not whole."""
    return path.with_name(path.name + ".part")


def download(file: RemoteFile, path: Path, *, stop: Event | None = None) -> str:
    """The SHA-256 of a file on the Hub, measured, which is at `path` then and nothing else of it on disk.

    Bytes that an earlier try left there, whole or in part, are hashed again and kept if the result has the SHA-256
    that the Hub states; where they spoil it, or it states none, the file is downloaded from its beginning.

    Args:
        file: What to download.
        path: Where it goes; its folder is made if need be.
        stop: Once set from another thread, the download ends in an AccessError soon.

    Raises:
        InputError: The file on the Hub is another one than was listed.
        AccessError: It cannot be had, or came out with another SHA-256 than the Hub states.
        ResourceError: The disk is full.
    """
    part = part_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # Whole, from a run that was killed; whether all of it reached the disk is for its hash to say.
            path.replace(part)
        kept, found = _complete(file, part, stop)
        if kept and found != file.sha256:
            part.unlink()
            _, found = _complete(file, part, stop)
        if file.sha256 is not None and found != file.sha256:
            part.unlink()
            raise AccessError(
                f"{label_of(file)} came out with SHA-256 {found}, and the Hub states {file.sha256}; it was "
                "damaged on the way: run the command again"
            )
        part.replace(path)
    return found


def _complete(file: RemoteFile, part: Path, stop: Event | None) -> tuple[int, str]:
    """How many bytes were there already, and the SHA-256 now that all are."""
    digest = hashlib.sha256()
    # Nothing could tell whether a beginning belongs to this file where the Hub states no hash.
    resumable = file.sha256 is not None and part.exists()
    with part.open("r+b" if resumable else "wb", buffering=_CHUNK) as target:
        kept = _hash_kept(target, file.size, digest) if resumable else 0

        def sink(piece: bytes) -> None:
            target.write(piece)
            digest.update(piece)

        read_range(file, kept, file.size - kept, sink, stop=stop)
    return kept, digest.hexdigest()


def _hash_kept(target: BinaryIO, size: int, digest: Any) -> int:
    """Bytes at the beginning that may stay, hashed; a file that is longer than it should be is emptied."""
    kept, buffer = 0, bytearray(_CHUNK)
    if target.seek(0, 2) > size:
        target.truncate(0)
    target.seek(0)
    while count := target.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(memoryview(buffer)[:count])
        kept += count
    return kept
