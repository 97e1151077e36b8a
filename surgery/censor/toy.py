"""The paper's toy: points x ~ N(0, I) in 25 dimensions and two random linear classifiers of them, good and bad."""

from dataclasses import dataclass

import torch

from surgery.censor.examples import Examples
from surgery.train.seeding import seeded


@dataclass(frozen=True)
class Toy:
    """Two tasks in which nothing tells one label from the other.

    The authors draw a million points once; here each is new.

    Attributes:
        dimensions: Of a point.
        seed: Of the two classifiers.
    """

    dimensions: int = 25
    seed: int = 0

    def draw(self, count: int, source: torch.Generator) -> Examples:
        """New points with their labels, 1 on the positive side of a classifier and 0 on the other."""
        fixed = torch.Generator().manual_seed(seeded(self.seed, "classifiers"))
        good, bad = torch.randn(2, self.dimensions, generator=fixed)
        points = torch.randn(count, self.dimensions, generator=source)
        return Examples(points, (points @ good > 0).long(), (points @ bad > 0).long())
