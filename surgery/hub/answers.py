"""Whether an answer is the part of the file that was asked for, of the content that was listed.

An answer is held against what the Hub listed when the run was planned: the commit and the content's ETag that the
Hub's own headers state (storage servers state another ETag), and the size in Content-Range (RFC 9110 section 14.4).
"""

import re
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.reading import shown
from surgery.errors import AccessError, InputError, SurgeryError
from surgery.hub.refusals import host, refusal
from surgery.hub.repository import Repository
from surgery.hub.source import RemoteFile

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def label_of(file: RemoteFile) -> str:
    """What messages call a file on the Hub."""
    return f"{file.repository}@{file.commit}/{shown(file.name)}"


def check_answer(response: Any, file: RemoteFile, start: int, size: int) -> None:
    """Refuse an answer, of the Hub's HTTP client, that has other bytes than those asked for.

    Raises:
        InputError: The Hub states another commit, content or size than it listed.
        AccessError: It is no part of a file, or another part.
    """
    for one in (*response.history, response):
        _check_identity(one.headers, file)
    _check_range(response, file, start, size)


def _check_identity(headers: Any, file: RemoteFile) -> None:
    """Refuse an answer of the Hub that states another commit or content; storage servers state neither."""
    commit = headers.get("X-Repo-Commit", file.commit)
    if commit != file.commit:
        raise _changed(file, f"commit {shown(commit)}")
    stated = headers.get("X-Linked-Etag")
    if stated is None and "X-Repo-Commit" in headers and "Location" not in headers:
        stated = headers.get("ETag")
    if stated and file.etag and stated.removeprefix("W/").strip('"') != file.etag:
        raise _changed(file, f"ETag {shown(stated)}")


def _check_range(response: Any, file: RemoteFile, start: int, size: int) -> None:
    """Refuse an answer with other bytes than those asked for."""
    encoding = response.headers.get("Content-Encoding", "identity")
    whole = start == 0 and size == file.size
    if encoding != "identity" or response.status_code not in ((206, 200) if whole else (206,)):
        raise AccessError(
            f"{host()} does not send a part of {label_of(file)} as asked (status {response.status_code}), and "
            "streaming needs that; run without --stream, or check HF_ENDPOINT"
        )
    if response.status_code == 200:
        length = response.headers.get("Content-Length", str(file.size))
        if length != str(file.size):
            raise _changed(file, f"{shown(length)} bytes, {file.size} when listed")
        return
    stated = response.headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(stated)
    span = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    length = response.headers.get("Content-Length", str(len(span)))
    if found is None or span.start != start or not 0 < len(span) <= size or length != str(len(span)):
        raise AccessError(
            f"{host()} sent the wrong part of {label_of(file)} ({shown(stated) or 'no Content-Range'}); run the "
            "command again"
        )
    if found[3] not in ("*", str(file.size)):
        raise _changed(file, f"{found[3]} bytes, {file.size} when listed")


def _changed(file: RemoteFile, found: str) -> InputError:
    return InputError(
        f"{label_of(file)} is not the file that was listed ({found}); it changed on the Hub: run the command again"
    )


def refused(error: "HfHubHTTPError", file: RemoteFile) -> SurgeryError:
    """The error to show for an answer that is no success."""
    status, headers = error.response.status_code, error.response.headers
    if status == 416:
        return _changed(file, f"it is shorter than {file.size} bytes")
    if headers.get("X-Error-Code") == "EntryNotFound":
        return AccessError(f"{host()} has no {label_of(file)} any more; check the repository's history")
    return AccessError(refusal(status, headers, Repository(file.repository, file.commit)))
