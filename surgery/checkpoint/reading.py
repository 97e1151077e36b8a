"""Opening files that may be missing, unreadable or no files at all, with errors the user can act on."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from surgery.errors import AccessError, InputError, ResourceError

LARGEST_TEXT = 100_000_000
"""Bytes up to which JSON is read: the limit that the safetensors library sets on headers."""

_SHOWN = 160


def shown(name: str) -> str:
    """A name from an untrusted file as it can stand in a one-line message: printable and at most 160 long."""
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= _SHOWN else f"{printable[:_SHOWN]}..."


@contextmanager
def reading(label: str) -> Iterator[None]:
    """A block in which failures of the file system become errors that name `label`.

    Raises:
        AccessError: There is no right to read.
        ResourceError: Too many files are open.
        InputError: Anything else: missing, a broken link, a failing disk.
    """
    try:
        yield
    except PermissionError as error:
        raise AccessError(f"no right to read {label}; change its permissions, or run as its owner") from error
    except FileNotFoundError as error:
        raise InputError(f"{label} is missing (or a link to nothing); complete the download") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ResourceError(f"too many files are open to read {label}; raise `ulimit -n`") from error
        raise InputError(
            f"{label} cannot be read ({error.strerror or error}); check the path and the disk"
        ) from error


def open_regular(path: Path, label: str) -> FileIO:
    """An unbuffered file opened for reading, links followed; never waits on a pipe or a device.

    Raises:
        InputError: It is missing or no regular file.
        AccessError: There is no right to read it.
    """
    with reading(label):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(
                f"{label} is not a regular file, and a checkpoint's file is needed; check the path"
            )
        return FileIO(descriptor, "rb")


def read_exactly(file: FileIO, buffer: memoryview, offset: int, label: str) -> None:
    """Fill a buffer of bytes from a position; safe from several threads.

    Raises:
        InputError: The file ends before the buffer is full.
    """
    while buffer:
        with reading(label):
            count = os.preadv(file.fileno(), [buffer[: 1 << 30]], offset)
        if not count:
            raise InputError(f"{label} ended early: it changed while it was read; download it again")
        buffer, offset = buffer[count:], offset + count


def read_text(path: Path, label: str) -> bytes:
    """All bytes of a small file.

    Raises:
        InputError: Missing, no regular file, or above 100 MB.
        AccessError: There is no right to read it.
    """
    with open_regular(path, label) as file, reading(label):
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_TEXT:
            raise InputError(
                f"{label} has {size} bytes, and at most {LARGEST_TEXT} are read; it is not a usual one"
            )
        return file.read(size)
