"""Steps of an optimiser that can be differentiated: an attacker's weights as a function of those it began with.

With theta_{i+1} = theta_i - rate * u(g_0 .. g_i) and g_i = dL/dtheta (theta_i), exact steps keep the whole graph, so
that the derivative of theta_K goes through every g_i (second derivatives of L); the others give each theta_i as a
leaf, and what is differentiated there is carried straight to theta_0 (first order).

Adam's root has an infinite derivative at 0, where a weight without gradient has its second moment: the constant in
`inside` stands under the root.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Weights = Mapping[str, Tensor]
Loss = Callable[[Weights, int], Tensor]
"""The attacker's loss at some weights, at inner step i from 0."""


@dataclass(frozen=True)
class SGD:
    """Plain descent."""


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction.

    Attributes:
        betas: Of the moments.
        eps: Added to the root.
        inside: Added under the root.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    inside: float = 1e-16


def trajectory(
    loss: Loss,
    start: Weights,
    steps: int,
    optimiser: SGD | Adam,
    rate: Float[Tensor, ""] | float,
    *,
    exact: bool = True,
    clip: float | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The weights after 1, 2, .. `steps` steps.

    Args:
        loss: Of the attacker; twice differentiable if `exact`.
        start: Its first weights.
        steps: How many.
        optimiser: How a step is made of gradients.
        rate: Length of a step; a tensor may require a gradient.
        exact: Whether what is given can be differentiated in `start` and `rate`; if not, it consists of leaves.
        clip: Norm to which the gradient of a step is cut; the norm counts as a constant.
    """
    weights = {
        name: weight if exact and weight.requires_grad else _leaf(weight) for name, weight in start.items()
    }
    first = second = [torch.zeros((), dtype=weight.dtype) for weight in weights.values()]
    for number in range(steps):
        found = torch.autograd.grad(
            loss(weights, number), list(weights.values()), create_graph=exact, allow_unused=True
        )
        gradients = _clipped(
            [
                torch.zeros_like(weight) if one is None else one
                for weight, one in zip(weights.values(), found, strict=True)
            ],
            clip,
        )
        moves: Sequence[Tensor] = gradients
        if isinstance(optimiser, Adam):
            first, second, moves = _moments(optimiser, first, second, gradients, number + 1)
        weights = {
            name: weight - rate * move for (name, weight), move in zip(weights.items(), moves, strict=True)
        }
        if not exact:
            weights = {name: _leaf(weight) for name, weight in weights.items()}
        yield weights


def _leaf(weight: Tensor) -> Tensor:
    return weight.detach().requires_grad_()


def _moments(
    adam: Adam, first: Sequence[Tensor], second: Sequence[Tensor], gradients: Sequence[Tensor], taken: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Adam's moments after a step, and its direction."""
    one, two = adam.betas
    first = [one * before + (1 - one) * gradient for before, gradient in zip(first, gradients, strict=True)]
    second = [
        two * before + (1 - two) * gradient.square()
        for before, gradient in zip(second, gradients, strict=True)
    ]
    moves = [
        (mean / (1 - one**taken)) / ((square / (1 - two**taken) + adam.inside).sqrt() + adam.eps)
        for mean, square in zip(first, second, strict=True)
    ]
    return list(first), second, moves


def _clipped(gradients: Sequence[Tensor], largest: float | None) -> list[Tensor]:
    """The gradients, cut to a joint norm."""
    if largest is None:
        return list(gradients)
    norm = torch.nn.utils.get_total_norm([gradient.detach() for gradient in gradients])
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * scale.to(gradient.dtype) for gradient in gradients]
