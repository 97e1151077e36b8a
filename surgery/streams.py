"""The checkpoints of a run, open for reading: folders on disk, or the Hub shard by shard (`--stream`)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Reader
from surgery.hub.remote import RemoteShard
from surgery.hub.remote_reader import RemoteReader
from surgery.hub.window import ShardWindow
from surgery.job import Job


class Inputs:
    """Readers of both checkpoints; use as a context manager.

    Streamed, the shards of the aligned checkpoint are downloaded one ahead of the work and deleted when they are
    `done`, and tensors of the base are read by range requests. `close` ends what is under way, so that nobody
    waits for a download that no longer comes; call it before waiting for those who read.

    Args:
        job: The run.
        folder: Where shards may lie while they are needed.
        shards: Those of the aligned checkpoint that will be read, in that order.

    Attributes:
        aligned: Reads the aligned checkpoint.
        base: Reads the base.
    """

    aligned: Reader
    base: Reader

    def __init__(self, job: Job, folder: Path, shards: Sequence[Shard]) -> None:
        self._window = ShardWindow(job.aligned, folder, shards=shards) if job.options.stream else None
        self.aligned = self._window.reader if self._window else Reader(job.aligned)
        far = any(isinstance(shard, RemoteShard) for shard in job.base.shards)
        self._remote = RemoteReader(job.base) if self._window and far else None
        self.base = self._remote or Reader(job.base)
        self._edited = job.edited
        self._stack = ExitStack()

    def __enter__(self) -> "Inputs":
        self._stack.enter_context(self._window or self.aligned)
        self._stack.enter_context(self.base)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def close(self) -> None:
        """End downloads and requests that are under way; who waits for one gets an error."""
        for remote in (self._window, self._remote):
            if remote is not None:
                remote.close()

    def done(self, shard: Shard) -> None:
        """Give up the disk of a shard that was read."""
        if self._window is not None:
            self._window.done(shard)

    def measured(self, otherwise: Callable[[str, Shard], str]) -> Callable[[str, Shard], str]:
        """How a shard's SHA-256 is had: taken while it was downloaded, `otherwise` as for other files."""

        def measure(role: str, shard: Shard) -> str:
            streamed = role == self._edited and isinstance(shard, RemoteShard)
            return self._window.sha256(shard) if self._window and streamed else otherwise(role, shard)

        return measure
