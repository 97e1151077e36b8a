"""What to say when the Hub, the network or the rights stand in the way: one line, without secrets."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from surgery.errors import AccessError, ResourceError, SurgeryError, UsageError

_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s']+|(?<=//)[^/@\s]+(?=@)")
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0


@runtime_checkable
class Named(Protocol):
    """A repository at a revision, as messages name it; `str` of it is `ORG/NAME[@REVISION]`."""

    @property
    def name(self) -> str:
        """`ORG/NAME`."""

    @property
    def revision(self) -> str | None:
        """A branch, tag or commit; None for the default branch."""


def check_endpoint() -> None:
    """Refuse an address of the Hub that is none: its client would fail while it is imported."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError("HF_ENDPOINT is no address of a Hub; write https://HOST[:PORT], or unset it")


def patience(
    status: int, headers: Mapping[str, str], wait: float, *, longest: float = _LONGEST_WAIT
) -> float | None:
    """Seconds to wait before asking again after an answer that was no success; None where that is no use.

    Args:
        status: Of the answer.
        headers: Of the answer; it may ask for a longer wait, by Retry-After (RFC 9110 section 10.2.3) or by the
            RateLimit header of the Hub.
        wait: Seconds that would be waited otherwise.
        longest: Seconds beyond which waiting is no use.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    asked = headers.get("Retry-After", "")
    pause = float(asked) if asked.isdecimal() else 0.0
    limit = parse_ratelimit_headers(headers) if status == 429 else None
    if limit is not None and limit.remaining == 0:
        pause = max(pause, float(limit.reset_in_seconds))
    return None if status not in _TRANSIENT or pause > longest else max(wait, pause)


@contextmanager
def plain_errors(repository: Named, *, begun: bool) -> Iterator[None]:
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
        raise UsageError(f"{repository} is no name of a repository: {detail(error)}") from None
    except UnicodeEncodeError:
        raise AccessError(
            "the token for the Hub has letters no token has; correct HF_TOKEN or run `hf auth login`"
        ) from None
    except OIDCError as error:
        raise AccessError(f"no token could be had for {repository}: {detail(error)}") from None
    except (HTTPError, OSError, ValueError) as error:
        # The client's own error says that nothing is cached either; what it met stands behind it.
        met = error if error.__cause__ is None or isinstance(error, HfHubHTTPError) else error.__cause__
        raise _explained(met, repository, begun=begun) from None


def _explained(error: BaseException, repository: Named, *, begun: bool) -> SurgeryError:
    """The error to show for one of the Hub's client."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return AccessError(refusal(error.response.status_code, error.response.headers, repository))
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return AccessError(
            f"{no_folder(repository)}HF_HUB_OFFLINE is set and the cache does not hold all of {repository}; unset "
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
            f"the download of {repository} broke off ({detail(error)}); run the command again to go on: files that "
            "are complete are kept"
        )
    return AccessError(
        f"{no_folder(repository)}{host()} could not be reached for {repository} ({detail(error)}); check the "
        "network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is cached"
    )


def refusal(status: int, headers: Mapping[str, str], repository: Named) -> str:
    """What to say of an answer of the Hub that is no success; its error codes tell more than the status."""
    hub, code = host(), headers.get("X-Error-Code")
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
            f"{no_folder(repository)}{hub} has no model {repository.name} that you may read; check the name, or "
            "log in with `hf auth login`"
        )
    if status == 403:
        return f"{hub} does not let this token read {repository}; give it the right to read, or use another"
    if status == 429:
        return f"{hub} takes no more requests for now, asked for {repository}; try again later, or log in"
    return f"{hub} answered {status} when asked for {repository}; try again later"


def no_folder(repository: Named) -> str:
    """How a message begins when what was named may have been meant as a folder."""
    return "" if os.path.lexists(str(repository)) else f"there is no folder {repository} here, and "


def host() -> str:
    """The Hub's address, without what may be secret in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def detail(error: BaseException) -> str:
    """The first line of an error's text, without tokens and passwords."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token.strip(), "***")
    return _SECRET.sub("***", text)
