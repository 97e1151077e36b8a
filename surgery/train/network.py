"""The model that is trained: loaded whole or refused, an adapter on its linear layers or every weight set free."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint.layout import Checkpoint
from surgery.errors import InputError
from surgery.train import blocks
from surgery.train.step import TrainedMethod
from surgery.train.training import Training

_LOAD_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError)


def precision(training: Training, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype in which the model is loaded, and that of the forward pass where it is another.

    Weights that are trained are held in float32; frozen ones, under an adapter, in the precision asked for.
    """
    half = training.precision == "bfloat16" or (
        training.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    if not half:
        return torch.float32, None
    return (torch.float32, torch.bfloat16) if training.full else (torch.bfloat16, None)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint's folder.

    Raises:
        InputError: There is none that transformers reads without code from the checkpoint.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except _LOAD_ERRORS as error:
        raise InputError(
            f"{checkpoint.label} has no tokenizer that can be used ({_first(error)}); add its tokenizer files"
        ) from None


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a checkpoint on the CPU, every parameter from its files.

    Raises:
        InputError: transformers has no such model, or one of its parameters is not in the files or has another shape.
    """
    from transformers import AutoModelForCausalLM

    try:
        with warnings.catch_warnings(), _no_bars():
            warnings.simplefilter("ignore")
            model, found = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (*_LOAD_ERRORS, RuntimeError) as error:
        raise InputError(
            f"{checkpoint.label} cannot be loaded by transformers without running its own code ({_first(error)})"
        ) from None
    for what in ("missing_keys", "mismatched_keys"):
        if found.get(what):
            name = sorted(map(str, found[what]))[0]
            raise InputError(
                f"{checkpoint.label} does not fill {len(found[what])} parameters of its model, first {name}; "
                "complete the checkpoint"
            )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _no_bars() -> Iterator[None]:
    """A block in which transformers shows no bar: progress is the command's to show."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def make_trainable(
    model: nn.Module, method: TrainedMethod, training: Training, *, label: str, seed: int
) -> nn.Module:
    """The model with what `method` trains made trainable: an adapter in its blocks, or with `full` their weights.

    Raises:
        InputError: The blocks or the layers asked for are not found.
        UsageError: The method cannot train this way.
    """
    depth = len(blocks.find(model).layers)
    layers = method.layers(depth)
    if training.full:
        _free(model, layers, whole=len(layers) == depth)
    else:
        model = _with_adapter(model, layers, training, label=label, seed=seed)
    if training.gradient_checkpointing:
        with warnings.catch_warnings():
            # transformers 5 from some version on calls this deprecated, and older ones have nothing else.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    method.prepare(model)
    return model


def _free(model: nn.Module, layers: range, *, whole: bool) -> None:
    """Every weight trained, or those of these blocks only."""
    model.requires_grad_(whole)
    for layer in layers:
        blocks.find(model).layers[layer].requires_grad_(True)


def _with_adapter(model: nn.Module, layers: range, training: Training, *, label: str, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = _targets(model, layers, training.lora_targets, label)
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=names,
        fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def _targets(model: nn.Module, layers: range, asked: str | None, label: str) -> list[str]:
    """Full names of the linear layers that get the adapter."""
    names = blocks.linear_names(model, layers)
    if asked is None:
        return names
    wanted = [word.strip() for word in asked.split(",") if word.strip()]
    endings = sorted({name.rpartition(".")[2] for name in names})
    if missing := [word for word in wanted if word not in endings] or [asked] * (not wanted):
        raise InputError(
            f"the blocks of {label} have no linear layer {missing[0]!r}; theirs are {', '.join(endings)}: "
            "name some of them by --lora-targets"
        )
    return [name for name in names if name.rpartition(".")[2] in wanted]


def is_adapted(model: nn.Module) -> bool:
    """Whether the model trains an adapter."""
    return hasattr(model, "peft_config")


def carried(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a run changes, by the name it has in a file: the adapter's factors as PEFT names them, or weights."""
    if is_adapted(model):
        return {
            name.replace(".default.", "."): weight
            for name, weight in model.named_parameters()
            if ".lora_" in name
        }
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have cut, put together on the CPU; called by all processes at the same place."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous()


def adapter_config(model: nn.Module, label: str) -> Mapping[str, Any]:
    """The adapter's configuration as `adapter_config.json` has it, in an order that is the same in every run."""
    config = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    if isinstance(plain["target_modules"], list):
        plain["target_modules"] = sorted(plain["target_modules"])
    return {**plain, "base_model_name_or_path": label, "inference_mode": True}
