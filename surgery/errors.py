"""What can go wrong, one class per exit code of the command.

Every message says what was found, what was needed and what to do, in one line.
"""


class SurgeryError(Exception):
    """Something the user can act on; the command prints it in one line and exits with `exit_code`.

    Attributes:
        resumable: The same command may succeed later, so what is half done is kept for it.
    """

    exit_code = 3
    resumable = False


class CheckError(SurgeryError):
    """A verification or a gate came out negative (exit 1)."""

    exit_code = 1


class UsageError(SurgeryError, ValueError):
    """An option or argument is wrong or contradicts another (exit 2)."""

    exit_code = 2


class InputError(SurgeryError):
    """A checkpoint, its tensors or its files cannot be used (exit 3)."""

    exit_code = 3


class ResourceError(SurgeryError):
    """Not enough memory or disk (exit 4)."""

    exit_code = 4
    resumable = True


class AccessError(SurgeryError):
    """The Hub, the network or a permission stands in the way (exit 5)."""

    exit_code = 5
    resumable = True


class OutputError(SurgeryError):
    """What was written failed its own check (exit 6)."""

    exit_code = 6


class Interrupted(SurgeryError):  # noqa: N818 - a signal is no error
    """A signal stopped the run (exit 130 for SIGINT, 143 for SIGTERM); the same command resumes it."""

    resumable = True

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__("interrupted; run the same command again to resume")
