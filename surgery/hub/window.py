"""A few shards of a checkpoint on the Hub on disk at a time: the next is downloaded while this one is used."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Condition, Event
from types import TracebackType

from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.reader import Reader, file_sha256
from surgery.checkpoint.staging import writing
from surgery.errors import AccessError, InputError
from surgery.hub.answers import label_of
from surgery.hub.download import download, part_of
from surgery.hub.remote import RemoteShard


class _WaitingReader(Reader):
    """A reader that has each shard taken before it reads from it."""

    def __init__(self, checkpoint: Checkpoint, take: Callable[[Shard], Path]) -> None:
        super().__init__(checkpoint)
        self._take = take

    def _fill(self, shard: Shard, buffer: memoryview, start: int) -> None:
        self._take(shard)
        super()._fill(shard, buffer, start)


class ShardWindow:
    """Shards of a checkpoint in the order they will be used, at most `1 + ahead` of them on disk at once.

    Use as a context manager: read tensors from `reader`, and call `done` for each shard when its last one is read.
    Several threads may read. A read of a shard that is not there yet waits for it, and for shards in front of it to
    be `done`; so shards are used in order, and no more than `1 + ahead` at once where one thread does it all.
    Shards that are not on the Hub are read where they lie, at once, and are never deleted.

    A download that broke off is taken up from the bytes in the folder, in this run and in the next one over the
    same folder: what is there is hashed again, and only a file with the SHA-256 that the Hub states is handed out.

    Args:
        checkpoint: As `open_source` gives it.
        folder: Where the files go, of this process alone; made if need be, removed at the end if it is empty.
        shards: Those that will be used, in that order; all by default. A resumed run leaves out what it has done.
        ahead: Shards that are downloaded before they are used, at least 0.

    Attributes:
        checkpoint: The checkpoint with its shards' paths in the folder.
        reader: Reads tensors, each once its shard is there.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, *, shards: Sequence[Shard] | None = None, ahead: int = 1
    ) -> None:
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}, and at least 0 is needed")
        self._folder = folder
        self._ahead = ahead
        placed = tuple(self._placed(shard) for shard in checkpoint.shards)
        self.checkpoint = replace(checkpoint, shards=placed)
        self.reader: Reader = _WaitingReader(self.checkpoint, self.take)
        by_name = {shard.name: shard for shard in placed}
        self._waiting = [by_name[shard.name] for shard in (checkpoint.shards if shards is None else shards)]
        self._begun: dict[str, Future[str]] = {}
        self._done: set[str] = set()
        self._change = Condition()
        self._stop = Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="surgery-download")

    def _placed(self, shard: Shard) -> Shard:
        return replace(shard, path=self._folder / shard.name) if isinstance(shard, RemoteShard) else shard

    def __enter__(self) -> "ShardWindow":
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear({shard.name for shard in self._waiting[: 1 + self._ahead]})
        with self._change:
            for _ in range(1 + self._ahead):
                self._start_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._pool.shutdown(cancel_futures=True)
        self.reader.__exit__(kind, error, trace)
        for folder in {self._folder, *(shard.path.parent for shard in self._remote())}:
            with suppress(OSError):
                folder.rmdir()

    def close(self) -> None:
        """End downloads, and reads that wait for one in other threads, in an AccessError; what came is kept."""
        with self._change:
            self._stop.set()
            for future in self._begun.values():
                future.cancel()
            self._change.notify_all()

    def _remote(self) -> list[RemoteShard]:
        return [shard for shard in self.checkpoint.shards if isinstance(shard, RemoteShard)]

    def _clear(self, kept: set[str]) -> None:
        """Remove what an earlier run left of shards that will not be needed at once."""
        for shard in self._remote():
            if shard.name not in kept:
                shard.path.unlink(missing_ok=True)
                part_of(shard.path).unlink(missing_ok=True)

    def _start_next(self) -> None:
        if self._waiting:
            shard = self._waiting.pop(0)
            self._begun[shard.name] = self._pool.submit(self._bring, shard)

    def take(self, shard: Shard) -> Path:
        """Where a shard's file is, once it is there whole; `reader` does this by itself.

        Raises:
            InputError: The file on the Hub is another one than was planned with.
            AccessError: It cannot be had, came out with another SHA-256 than the Hub states, or was still waited for
                when the window was closed.
            ResourceError: The disk is full.
        """
        if shard.name in self._done:
            raise ValueError(f"{shard.name} was done before")
        if not isinstance(shard, RemoteShard):
            return shard.path
        self.sha256(shard)
        return self._folder / shard.name

    def sha256(self, shard: Shard) -> str:
        """The SHA-256 of a shard, measured as it came in, once it is there: 64 hexadecimal digits.

        Errors as those of `take`; also of a shard that is done.
        """
        with self._change:
            if shard.name not in self._begun and all(one.name != shard.name for one in self._waiting):
                raise ValueError(f"{shard.name} is not among the shards of this window")
            self._change.wait_for(lambda: shard.name in self._begun or self._stop.is_set())
            future = self._begun.get(shard.name)
        try:
            if future is not None:
                return future.result()
        except CancelledError:
            pass
        raise AccessError(f"{shard.name} was not downloaded any more; run the command again")

    def done(self, shard: Shard) -> None:
        """Delete a shard whose tensors nobody reads any more; the next download may start."""
        self.take(shard)
        with self._change:
            self._done.add(shard.name)
            self.reader.release(shard.name)
            if isinstance(shard, RemoteShard):
                with writing(self._folder):
                    (self._folder / shard.name).unlink()
            self._start_next()
            self._change.notify_all()

    def _bring(self, shard: Shard) -> str:
        """The SHA-256 of a shard, which is at its path then, with the header that was planned with."""
        if not isinstance(shard, RemoteShard):
            return file_sha256(shard.path)
        found = download(shard.remote, shard.path, stop=self._stop)
        with shard.path.open("rb") as file:
            if file.read(shard.header.length) != shard.header.raw:
                raise InputError(f"{label_of(shard.remote)} changed after its header was read; run again")
        return found
