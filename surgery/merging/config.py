"""What an adapter's `adapter_config.json` means for a merge: ranks, scalings, and what cannot be merged at all.

The format is PEFT's (https://github.com/huggingface/peft, `LoraConfig`, 0.21). Fields that decide the weights and
are not known here are refused, so that no part of an adapter is silently left out.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.jsontext import json_object
from surgery.checkpoint.reading import read_text, shown
from surgery.errors import InputError

CONFIG = "adapter_config.json"

# Ways to begin training after which the base's weights are still the base's. Others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) take the beginning out of the base, to which such an adapter then no longer belongs.
_HARMLESS_STARTS = frozenset(("gaussian", "eva", "orthogonal"))
# Fields that say nothing about the merged weights, or are followed here.
_KNOWN = frozenset(
    ("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
     "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
     "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
     "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
     "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora",
     "use_rslora")
)  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """An adapter's config, checked.

    Attributes:
        label: What messages call the adapter.
        fields: As they stand in the file.
        sha256: Of the file.
    """

    label: str
    fields: Mapping[str, Any]
    sha256: str

    def rank(self, module: str) -> int:
        """The rank that a module's factors should have, 0 where none is known."""
        found = self._by_pattern("rank_pattern", module, self.fields.get("r"))
        return found if isinstance(found, int) and found > 0 else 0

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = self._by_pattern("alpha_pattern", module, self.fields.get("lora_alpha"))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise InputError(
                f"{self.label}/{CONFIG} gives {module} the alpha {alpha!r}, and a number is needed; correct it"
            )
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank

    def _by_pattern(self, field: str, module: str, otherwise: Any) -> Any:
        for pattern, value in (self.fields.get(field) or {}).items():
            if _matches(pattern, module):
                return value
        return otherwise

    def targets(self, module: str) -> bool:
        """Whether the list of target modules means this module; never where they are a pattern."""
        named = self.fields.get("target_modules")
        names = named if isinstance(named, list) else []
        return any(module == name or module.endswith(f".{name}") for name in names)

    def saves(self, module: str) -> bool:
        """Whether the adapter has a trained copy of a module (`modules_to_save`)."""
        names = self.fields.get("modules_to_save") or ()
        return any(module == name or module.endswith(f".{name}") for name in names)

    @property
    def complete(self) -> bool:
        """Whether every layer that a target module means has factors: none is excluded."""
        return not any(
            self.fields.get(key) for key in ("layers_to_transform", "exclude_modules", "target_parameters")
        )

    @property
    def model(self) -> str:
        """The model that the adapter says it belongs to; empty where it says nothing."""
        named = self.fields.get("base_model_name_or_path")
        return named if isinstance(named, str) else ""

    @property
    def transposed(self) -> bool:
        """Whether the adapter says that its modules store their weights as (in, out)."""
        return bool(self.fields.get("fan_in_fan_out"))


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def read_settings(folder: Path, label: str) -> LoraSettings:
    """The checked config of the adapter in a folder.

    Raises:
        InputError: There is none, or it asks for what a merge cannot do; the message names the field.
    """
    where = f"{label}/{CONFIG}"
    text = read_text(folder / CONFIG, where)
    fields = json_object(text, where, strict=False)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where} has peft_type {shown(str(kind))}, and LORA is needed; merge it with PEFT")
    start = fields.get("init_lora_weights", True)
    if start and start is not True and start not in _HARMLESS_STARTS:
        raise InputError(
            f"{where} has init_lora_weights {shown(str(start))}, which takes part of the base's weights into the "
            "adapter; convert it to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if unknown := sorted(key for key, value in fields.items() if value and key not in _KNOWN):
        raise InputError(
            f"{where} sets {shown(unknown[0])}, which merge cannot fold into the weights; merge it with PEFT"
        )
    _check_types(fields, where)
    return LoraSettings(label, fields, hashlib.sha256(text).hexdigest())


def _check_types(fields: Mapping[str, Any], where: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(key) or {}, dict):
            raise InputError(f"{where} has a {key} that is no object; write the adapter again")
    for pattern in (*(fields.get("rank_pattern") or {}), *(fields.get("alpha_pattern") or {})):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{where} has the pattern {shown(pattern)}, which is none ({error})") from None
