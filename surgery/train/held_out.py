"""Rows that simulated attackers never see, so that what is measured on them is no matter of memory."""

from collections.abc import Sequence
from typing import Any

import torch

from surgery.errors import InputError
from surgery.train.seeding import seeded

SHARE = 0.2
"""Of the prompts, those held out: TAR's fifth."""


def split(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Tokenised rows for attackers, and those of a fifth of the prompts (at least one), which they do not see.

    Raises:
        InputError: There are fewer than two prompts.
    """
    prompts = list(dict.fromkeys(example.tokens[: example.prompt] for example in rows))
    if len(prompts) < 2:
        raise InputError(
            f"the harmful rows have {len(prompts)} prompt; 2 or more are needed, some for attackers and some "
            "to measure on: add rows to --harmful-data"
        )
    source = torch.Generator().manual_seed(seeded(seed, "held out") % 2**32)
    order = torch.randperm(len(prompts), generator=source).tolist()
    apart = {prompts[place] for place in order[: max(1, round(SHARE * len(prompts)))]}
    return (
        [example for example in rows if example.tokens[: example.prompt] not in apart],
        [example for example in rows if example.tokens[: example.prompt] in apart],
    )
