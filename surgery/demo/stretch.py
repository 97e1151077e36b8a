"""Taking gradients further along a model's own update, so that extrapolating it leaves a working model.

A model this small, fine-tuned in the ordinary way, breaks when its alignment update is made two and a half times
as large (figures in docs/demo.md). Training at points on the way as well makes its basin wide enough.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module


class Stretch:
    """Draws where to take the next gradient of `model`, whose weights at this moment are the origin.

    Half of the draws are at `origin + delta`, the model as it is; the others at `origin + c delta` with `c`
    uniform in [1, `furthest`].
    """

    def __init__(self, model: Module, furthest: float, seed: int) -> None:
        self._model = model
        self._origin = [weight.detach().clone() for weight in model.parameters()]
        self._furthest = furthest
        self._draws = random.Random(seed)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the model's weights are those of the point drawn; afterwards they are exactly as before."""
        if self._draws.random() < 0.5:
            yield
            return
        more = self._draws.uniform(0.0, self._furthest - 1.0)
        weights = list(self._model.parameters())
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, origin in zip(weights, self._origin, strict=True):
                weight.add_(weight - origin, alpha=more)
        yield
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
