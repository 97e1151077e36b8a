"""How to run, as against what to compute: none of these changes which equation is applied."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_doc import Doc

from surgery.choices import require_choices
from surgery.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Options that every command which writes a model shares."""

    rounding: Annotated[
        Literal["auto", "nearest", "compensated", "stochastic"],
        Doc(
            "How edited weights get back into their dtype; auto: nearest where 99 % of the edit survives it."
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        Doc("Dtype of the output; other than keep casts every floating tensor."),
    ] = "keep"
    as_lora: Annotated[bool, Doc("Write the edit as a PEFT adapter on its anchor, not as a model.")] = False
    seed: Annotated[int, Doc("Seed of everything random.")] = 0
    device: Annotated[str, Doc("Where to compute: auto, cpu, cuda or cuda:N.")] = "auto"
    memory_limit: Annotated[
        str | None, Doc("Memory to stay within, as 2GiB; refused at once where one tensor alone needs more.")
    ] = None
    stream: Annotated[
        bool, Doc("Read Hub sources shard by shard: disk for the output and two shards is enough.")
    ] = False
    overwrite: Annotated[bool, Doc("Replace an output that surgery wrote before.")] = False
    allow_pickle: Annotated[bool, Doc("Read .bin weights (pickles), with code in them refused.")] = False
    i_checked_the_order: Annotated[
        bool, Doc("Go on although cards or chat templates say BASE and ALIGNED are swapped.")
    ] = False

    def __post_init__(self) -> None:
        require_choices(self)
        if self.as_lora and self.dtype != "keep":
            raise UsageError("an adapter's factors are float32; leave out --dtype with --as-lora")
        if self.as_lora and self.stream:
            raise UsageError("an adapter is made from whole checkpoints; leave out --stream with --as-lora")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
