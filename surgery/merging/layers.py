"""Which parameter each layer of an adapter's file belongs to, as PEFT itself decides it.

PEFT's rules differ between kinds of modules and model types (experts that are one parameter, lookups, transposed
layers), so the adapter is set up by PEFT on a model without weights and read off it. This is asked only for layers
that the names in the files do not settle: it builds the model class, which takes seconds.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.adapter_peft import INJECT_ERRORS, NAME, PREFIX


@dataclass(frozen=True)
class Adapting:
    """What PEFT takes a layer of an adapter for.

    Attributes:
        parameter: The parameter that it adapts, by its full name in the model.
        rank: Of its factors; of each expert's for a stack.
        scaling: What their product is multiplied by.
        transposed: Whether the parameter holds the transpose of B A.
        experts: How many matrices the parameter stacks; 0 where it is one matrix.
    """

    parameter: str
    rank: int
    scaling: float
    transposed: bool
    experts: int


def adapting(fields: Mapping[str, Any], model: nn.Module) -> dict[str, Adapting]:
    """What PEFT would adapt in a model by a config, by the names that layers have in an adapter's file.

    Args:
        fields: Of `adapter_config.json`; those that this version of PEFT does not know are left out.
        model: Without weights; changed.

    Raises:
        ValueError: PEFT cannot adapt this model so; the message is PEFT's.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    known = {entry.name for entry in dataclasses.fields(LoraConfig)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = LoraConfig(**{key: value for key, value in fields.items() if key in known})
        try:
            adapted: Any = get_peft_model(model, own, low_cpu_mem_usage=True)
        except INJECT_ERRORS as error:
            raise ValueError(str(error).strip().partition("\n")[0][:200]) from None
    return {
        name.removeprefix(PREFIX): _adapting(name.removeprefix(PREFIX), layer)
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _adapting(name: str, layer: Any) -> Adapting:
    module, stack = name.replace(".base_layer", ""), getattr(layer, "num_experts", 1)
    if stack > 1:
        transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False))
    else:
        transposed = NAME in layer.lora_embedding_A or bool(getattr(layer, "fan_in_fan_out", False))
    parameter = f"{module}.{getattr(layer, 'parameter_name', 'weight')}"
    return Adapting(parameter, layer.r[NAME], layer.scaling[NAME], transposed, stack if stack > 1 else 0)
