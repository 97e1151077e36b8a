"""Kinds of work: stacks of experts against one matrix, compensated rounding against nearest."""

import torch

from benchmarks.pairs import update
from benchmarks.timing import Measured, Row, alternated, median, spread, timed
from surgery.methods.lox import LoX
from surgery.rounding import Mode, store
from surgery.spectral import Factors

EXPERTS, ROWS, COLUMNS = 128, 768, 2048


def experts(repeats: int, count: int = EXPERTS) -> list[Row]:
    """The edit of a stack of experts over that of one matrix with as many entries, one thread each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    method = LoX(rank=6, alpha=1.5)
    side = round((count * ROWS * COLUMNS) ** 0.5)

    def edited(aligned: torch.Tensor, base: torch.Tensor) -> Measured:
        return timed(lambda: method.update(aligned, base, name="bench", seed=0))

    def pair(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(stack.shape, generator=generator)
        return weight.bfloat16(), (weight - 0.01 * stack).bfloat16()

    many = pair(torch.stack([update("spiked", ROWS, COLUMNS, generator) for _ in range(count)]))
    single = pair(update("spiked", side, side, generator))
    taken = alternated({"experts": lambda: edited(*many), "single": lambda: edited(*single)}, repeats)
    value = median(taken["experts"]) / median(taken["single"])
    return [
        Row(
            f"{count} experts of {COLUMNS} x {ROWS} / one matrix with as many entries: edit",
            value,
            "x",
            "at most 3",
            value <= 3,
            f"{spread(taken['experts'])} against {spread(taken['single'])}",
        )
    ]


def rounding(repeats: int, sides: tuple[int, int] = (4096, 11008)) -> list[Row]:
    """Compensated rounding over nearest, for edits of two sizes, one thread each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(sides, generator=generator).mul_(0.02).bfloat16()
    left, right = (torch.linalg.qr(torch.randn(side, 6, generator=generator)).Q for side in sides)
    found = []
    for ratio in (1e-2, 1e-3):
        values = torch.linspace(2, 1, 6)
        values *= ratio * torch.linalg.vector_norm(weight.float()) / torch.linalg.vector_norm(values)
        factors = Factors(left, values, right.T.contiguous())
        kept: dict[str, float] = {}

        def once(mode: Mode, factors: Factors = factors, kept: dict[str, float] = kept) -> Measured:
            def call() -> None:
                kept[mode] = store(weight, factors, torch.bfloat16, mode=mode, seed=0, name="bench").retention

            return timed(call)

        modes: tuple[Mode, ...] = ("nearest", "compensated", "stochastic")
        taken = alternated({mode: lambda mode=mode: once(mode) for mode in modes}, repeats)
        value = median(taken["compensated"]) / median(taken["nearest"])
        entries = sides[0] * sides[1] / 1e9
        found.append(
            Row(
                f"{sides[0]} x {sides[1]}, edit/weight {ratio:g}: compensated / nearest",
                value,
                "x",
                "at most 2",
                value <= 2,
                "; ".join(
                    f"{mode} {median(taken[mode]) / entries:.1f} ns an entry, retention {kept[mode]:.4f}"
                    for mode in modes
                ),
            )
        )
    return found


def rows(repeats: int) -> list[Row]:
    """All of them."""
    return experts(repeats) + rounding(repeats)
