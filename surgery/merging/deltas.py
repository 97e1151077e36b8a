"""The delta of one tensor from the factors of adapters: dense as PEFT computes it, or low-rank for storing.

LoRA: W + s B A (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3), s = alpha / r or,
for rsLoRA, alpha / sqrt(r) (Kalajdzievski 2023, theorem 3.2). DoRA: m / ||W + s B A|| (W + s B A), norms over the
inputs of each output (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.checkpoint.reader import Reader
from surgery.errors import InputError
from surgery.merging.landing import Added, Lora, Part, Replaced
from surgery.spectral import Factors

# The share of a matrix's smaller side up to which its delta is worth holding as factors.
_LOW = 4


def rank_of(parts: Sequence[Part], shape: Sequence[int]) -> int | None:
    """The rank of the sum of plain low-rank deltas; None where it is held dense: DoRA, other parts, a large rank."""
    ranks = [part.rank for part in parts if isinstance(part, Lora) and part.magnitude is None]
    total = sum(ranks)
    return total if len(ranks) == len(parts) and total * _LOW <= min(shape[-2:]) else None


class Deltas:
    """Deltas of tensors from the files of adapters; several threads may share it.

    Args:
        adapters: Reads the tensors of all adapters.
        device: Where to compute.
    """

    def __init__(self, adapters: Reader, device: torch.device) -> None:
        self._adapters, self._device = adapters, device

    def read(self, name: str, label: str) -> Tensor:
        """A tensor of an adapter, finite.

        Raises:
            InputError: It holds NaN or infinity.
        """
        tensor = self._adapters.read(name)
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise InputError(
                f"{name.partition('/')[2]} of {label} holds NaN or infinity; the training that made it went astray: "
                "take an earlier checkpoint of it"
            )
        return tensor.to(self._device)

    def _outer(self, part: Lora) -> tuple[Float[Tensor, "*batch out r"], Float[Tensor, "*batch r into"]]:
        """B and A of a part in float32, those of a stack as batches."""
        a, b = self.read(part.a, part.label).float(), self.read(part.b, part.label).float()
        if part.experts:
            a = a.reshape(part.experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, part.experts).permute(2, 0, 1)
        return (b, a) if part.expert is None else (b[part.expert], a[part.expert])

    def low_rank(self, parts: Sequence[Lora], shape: Sequence[int]) -> Factors:
        """The sum of plain low-rank deltas of a tensor: orthonormal factors, scalings and weights folded in."""
        lefts, rights = [], []
        for part in parts:
            b, a = self._outer(part)
            left, right = (a.mT, b.mT) if part.transposed else (b, a)
            lefts.append(
                left[..., part.row : part.row + shape[-2], :].double() * (part.scaling * part.weight)
            )
            rights.append(right.double())
        return _orthonormal(torch.cat(lefts, -1), torch.cat(rights, -2))

    def dense(self, part: Part, shape: Sequence[int]) -> Tensor:
        """The delta of one part in float32, by PEFT's operations in their order."""
        if isinstance(part, Lora):
            return self._product(part, shape)
        delta = self.read(part.name, part.label).float()
        scaling = part.scaling if isinstance(part, Added) else 1.0
        return delta if scaling == 1.0 else delta.mul_(scaling)

    def moved(self, weight: Tensor, parts: Sequence[Part], shape: Sequence[int]) -> Tensor:
        """A float32 weight after every part, one after the other, as PEFT merges adapters."""
        weight = weight.clone()
        for part in parts:
            weight += self.dense(part, shape).reshape(weight.shape)
            if isinstance(part, Lora) and part.magnitude is not None:
                inputs = 0 if part.transposed else 1
                factor = self._magnitude(part) / torch.linalg.vector_norm(weight, dim=inputs)
                weight *= factor.unsqueeze(inputs)
        return weight

    def _product(self, part: Lora, shape: Sequence[int]) -> Tensor:
        b, a = self._outer(part)
        if not part.transposed:
            b = b[..., part.row : part.row + shape[-2], :]
        delta = (b @ a).mul_(part.scaling)
        if part.transposed:
            delta = delta.mT[..., part.row : part.row + shape[-2], :]
        return delta if part.weight == 1.0 else delta.mul_(part.weight)

    def _magnitude(self, part: Lora) -> Tensor:
        return self.read(part.magnitude or "", part.label).float().reshape(-1)

    def replacement(self, part: Replaced) -> Tensor:
        """The new value of a tensor, as the adapter stores it."""
        return self.read(part.name, part.label)


def _orthonormal(left: Float[Tensor, "*batch m r"], right: Float[Tensor, "*batch r n"]) -> Factors:
    """The product of two factors by its singular value decomposition, in float32."""
    q, upper = torch.linalg.qr(left)
    p, lower = torch.linalg.qr(right.mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT)
    return Factors((q @ u).float().contiguous(), values.float(), (v @ p.mT).float().contiguous())
