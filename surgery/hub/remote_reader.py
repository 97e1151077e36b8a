"""Tensors of a checkpoint on the Hub, each read by a range request straight into its own memory."""

from threading import Event
from types import TracebackType

from surgery.checkpoint.layout import Checkpoint, Shard
from surgery.checkpoint.reader import Reader
from surgery.hub.ranges import Places, read_range
from surgery.hub.remote import RemoteShard


class RemoteReader(Reader):
    """Reads tensors by name as `Reader` does, those of `RemoteShard`s over the network; other shards from disk.

    Several threads may share one. A connection that drops is taken up where it broke, a few times in a row.
    Leaving the context makes reads that are under way in other threads end in an AccessError.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._stop = Event()
        self._places: Places = {}

    def __enter__(self) -> "RemoteReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        super().__exit__(kind, error, trace)

    def close(self) -> None:
        """End reads over the network that are under way in other threads in an AccessError."""
        self._stop.set()

    def _fill(self, shard: Shard, buffer: memoryview, start: int) -> None:
        if not isinstance(shard, RemoteShard):
            super()._fill(shard, buffer, start)
            return
        end = 0

        def sink(piece: bytes) -> None:
            nonlocal end
            buffer[end : end + len(piece)] = piece
            end += len(piece)

        read_range(shard.remote, start, len(buffer), sink, stop=self._stop, places=self._places)
