"""Bytes of a file on the Hub by HTTP range requests, taken up where a connection broke."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from threading import Event
from typing import Any

from surgery import __version__
from surgery.errors import AccessError, SurgeryError
from surgery.hub.answers import check_answer, label_of, refused
from surgery.hub.refusals import detail, host, patience, plain_errors
from surgery.hub.repository import Repository
from surgery.hub.source import RemoteFile

Places = dict[RemoteFile, str]
"""Addresses at storage servers to which the Hub led, by file; shared by threads, dropped when they fail."""

_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 330.0
"""Seconds: the Hub counts requests over five minutes, and long runs outlast that."""

_PROGRESS = 1 << 23
"""Bytes that must come between two failures for the count of failures to start anew."""

_EXPIRED = (400, 401, 403, 404, 410)
"""How storage refuses a signed address that was valid once."""


class _Patience:
    """Counts failures in a row and waits longer after each.

    Args:
        file: What is read.
        stop: Once set, nothing is waited for any more.
    """

    def __init__(self, file: RemoteFile, stop: Event | None) -> None:
        self._file = file
        self._stop = stop
        self._failures = 0
        self._last = 0

    def after(self, error: Exception, got: int) -> None:
        """Wait after a failure with `got` bytes there; AccessError or InputError where that is no use."""
        from huggingface_hub.errors import HfHubHTTPError

        self._failures = 1 if got - self._last >= _PROGRESS else self._failures + 1
        self._last = got
        wait = _WAITS[self._failures - 1] if self._failures <= len(_WAITS) else None
        pause = wait
        if isinstance(error, HfHubHTTPError):
            answer = error.response
            pause = patience(answer.status_code, answer.headers, wait or 0.0, longest=_LONGEST_WAIT)
        if wait is None or pause is None:
            raise _lasting(error, self._file, self._failures) from None
        if self._stop is None:
            time.sleep(pause)
        else:
            self._stop.wait(pause)


def read_range(
    file: RemoteFile,
    start: int,
    size: int,
    sink: Callable[[bytes], object],
    *,
    stop: Event | None = None,
    places: Places | None = None,
) -> None:
    """Hand a range of a file's bytes to a function, piece by piece and in order; exactly `size` bytes or an error.

    Args:
        file: What to read from.
        start: Offset of the first byte.
        size: Bytes to read.
        sink: Takes each piece; what it raises is passed on.
        stop: Once set from another thread, reading ends in an AccessError soon.
        places: Kept between calls, it spares the Hub a request for each range after a file's first.

    Raises:
        InputError: The file on the Hub is another one than was listed.
        AccessError: The Hub, the network or the rights do not allow it, several times in a row.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    got, trouble = 0, _Patience(file, stop)
    places = {} if places is None else places
    while got < size:
        failure: Exception = EOFError("the answer ended early")
        try:
            with closing(_answer(file, start + got, size - got, places)) as answer:
                for piece in answer:
                    _check_piece(piece, file, size - got, stop)
                    sink(piece)
                    got += len(piece)
        except HTTPError as error:
            failure = error
        if got < size:
            places.pop(file, None)
            _check_piece(b"", file, size - got, stop)
            trouble.after(failure, got)


def read_bytes(file: RemoteFile, start: int, size: int) -> bytes:
    """A range of a file's bytes; errors as those of `read_range`."""
    content = bytearray()
    read_range(file, start, size, content.extend)
    return bytes(content)


def _check_piece(piece: bytes, file: RemoteFile, room: int, stop: Event | None) -> None:
    """Refuse to go on where it is not wanted, or where more came than was asked for."""
    if stop is not None and stop.is_set():
        raise AccessError(f"the download of {label_of(file)} was stopped; run the command again")
    if len(piece) > room:
        raise AccessError(f"{host()} sent more of {label_of(file)} than was asked for; run the command again")


def _answer(file: RemoteFile, start: int, size: int, places: Places) -> Generator[bytes, None, None]:
    """One request and the pieces of its answer, which may end early."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

    place = places.get(file)
    url, headers = _asked(file, place)
    # Compressed answers would be ranges of something else.
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{start + size - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        expired = place is not None and response.status_code in _EXPIRED
        if not expired:
            hf_raise_for_status(response)
            check_answer(response, file, start, size)
            if response.history and _origin(response.url) != _origin(response.history[0].url):
                places[file] = str(response.url)
            yield from response.iter_raw()
    if expired:
        places.pop(file, None)
        yield from _answer(file, start, size, places)


def _asked(file: RemoteFile, place: str | None) -> tuple[str, dict[str, str]]:
    """Address and headers of a request: with the token to the Hub, without it to storage."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with plain_errors(Repository(file.repository, file.commit), begun=True):
        # Anew each time: tokens of CI jobs run out.
        token = None if place is None else False
        headers = build_hf_headers(token=token, library_name="surgery", library_version=__version__)
        for value in headers.values():
            value.encode("ascii")
        return place or hf_hub_url(file.repository, file.name, revision=file.commit), headers


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _lasting(error: Exception, file: RemoteFile, failures: int) -> SurgeryError:
    """The error to show for trouble that does not pass."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return refused(error, file)
    return AccessError(
        f"reading {label_of(file)} from {host()} broke off {failures} times in a row ({detail(error)}); check the "
        "network and run the command again"
    )
