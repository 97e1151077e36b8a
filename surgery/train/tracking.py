"""The terms of the loss, told to who watches: a progress function and one of accelerate's trackers."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from surgery.train.crew import Crew
from surgery.train.loop import Progress
from surgery.train.step import TrainedMethod
from surgery.train.training import Training


@contextmanager
def tracking(
    crew: Crew, training: Training, method: TrainedMethod, progress: Progress | None
) -> Iterator[Progress | None]:
    """A block in which the function given is to be called after each step; trackers are closed at its end."""
    if training.track is None:
        yield progress
        return
    settings = {**dataclasses.asdict(training), **dataclasses.asdict(method), "method": method.name}
    plain = {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in settings.items()
    }
    crew.accelerator.init_trackers("surgery", config=plain)

    def told(done: int, total: int, terms: dict[str, float], left: float) -> None:
        crew.accelerator.log(terms, step=done)
        if progress is not None:
            progress(done, total, terms, left)

    try:
        yield told
    finally:
        crew.accelerator.end_training()
