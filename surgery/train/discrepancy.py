"""How far two samples are from being of one distribution: the maximum mean discrepancy."""

import torch
from jaxtyping import Float
from torch import Tensor

KERNELS, WIDER = 5, 2.0
"""Gaussian kernels, and by what each is wider than the one before."""


def mmd(one: Float[Tensor, "rows entries"], other: Float[Tensor, "others entries"]) -> Float[Tensor, ""]:
    """The biased estimate of the squared discrepancy, mean k(X, X) + mean k(Y, Y) - 2 mean k(X, Y), at least 0.

    k is the sum of five Gaussian kernels exp(-||x - y||^2 / b_i). Their widths b_i are 1/4, 1/2, 1, 2 and 4 times the
    mean squared distance of two different rows of both samples, and count as constants. Gretton, Borgwardt, Rasch,
    Scholkopf, Smola: "A Kernel Two-Sample Test", JMLR 2012; the widths are those of RepNoise's authors.

    Args:
        one: A sample; float64 keeps close samples apart.
        other: Another.
    """
    both = torch.cat([one, other])
    products = both @ both.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0)
    mean = distances.detach().sum() / (len(both) * (len(both) - 1))
    if float(mean) == 0:
        return distances.sum() * 0
    widths = mean * WIDER ** (torch.arange(KERNELS, dtype=both.dtype, device=both.device) - KERNELS // 2)
    kernels = torch.exp(-distances[..., None] / widths).sum(-1)
    size = len(one)
    return kernels[:size, :size].mean() + kernels[size:, size:].mean() - 2 * kernels[:size, size:].mean()
