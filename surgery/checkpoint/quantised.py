"""Refusing weights that are stored quantised: an edit of them would be lost or would corrupt them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.checkpoint.dtypes import INTEGER, NARROW_FLOAT
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.reading import shown
from surgery.errors import InputError

_ORIGINAL = "use the 16-bit checkpoint it was made from"
_DEQUANTISE = "load it with transformers, call model.dequantize() and save it, or use the 16-bit checkpoint"
_FP8 = "use a bf16 checkpoint, or load it with FineGrainedFP8Config(dequantize=True) and save it"
_MXFP4 = "load it with Mxfp4Config(dequantize=True) in transformers and save it in bf16"

# quant_method of config.json -> what it is called, and the way out. Others are named as they stand there.
_METHODS = {
    "bitsandbytes": ("bitsandbytes", _DEQUANTISE),
    "bitsandbytes_4bit": ("bitsandbytes 4-bit", _DEQUANTISE),
    "bitsandbytes_8bit": ("bitsandbytes 8-bit", _DEQUANTISE),
    "gptq": ("GPTQ", _ORIGINAL),
    "awq": ("AWQ", _ORIGINAL),
    "bitnet": ("BitNet (1-bit)", _ORIGINAL),
    "mxfp4": ("mxfp4", _MXFP4),
    "fp8": ("fp8", _FP8),
    "fbgemm_fp8": ("fp8 (fbgemm)", _FP8),
    "compressed-tensors": ("compressed-tensors", _ORIGINAL),
    "hqq": ("HQQ", _ORIGINAL),
}

# Names that only a quantised weight's parts have: first match decides, most telling first.
_NAMES = tuple(
    (re.compile(pattern), found, way_out)
    for pattern, found, way_out in (
        (
            r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map|nested_absmax)$",
            "bitsandbytes 4-bit",
            _DEQUANTISE,
        ),
        (r"\.(SCB|weight_format)$", "bitsandbytes 8-bit", _DEQUANTISE),
        (r"\.g_idx$", "GPTQ", _ORIGINAL),
        (r"\.(qweight|qzeros)$", "GPTQ or AWQ", _ORIGINAL),
        (r"\.weight_scale_inv$", "block-scaled fp8", _FP8),
        (r"\.weight_packed$", "compressed-tensors", _ORIGINAL),
        (r"\.W_q$", "HQQ", _ORIGINAL),
        (r"\.weight_scale_2$", "nvfp4", _ORIGINAL),
        (r"\.(codebooks|Qidxs)$", "vector-quantised", _ORIGINAL),
    )
)

_BUFFER = re.compile(
    r"(.*[._])?(bias|masked_bias|mask|ids?|index|indices|idx|position|positions|lengths?|num_batches_tracked|tid2eid)"
)
_PACKING = INTEGER - {"I64", "U64"}


def _configured(config: Mapping[str, Any]) -> str | None:
    """The quantisation that config.json states, at the top or for a part (text_config and the like)."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if isinstance(settings := part.get("quantization_config"), dict):
            return _method(settings)
        if isinstance(part.get("compression_config"), dict):
            return "compressed-tensors"
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", "quantised"))
    if method == "bitsandbytes" and settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        return "bitsandbytes_4bit"
    if method == "bitsandbytes" and settings.get("load_in_8bit", settings.get("_load_in_8bit")):
        return "bitsandbytes_8bit"
    return method


def _by_name(name: str) -> tuple[str, str] | None:
    return next(((found, way) for pattern, found, way in _NAMES if pattern.search(name)), None)


def _narrow(dtype: str) -> tuple[str, str]:
    return ("fp8", _FP8) if dtype.startswith(("F8_E4", "F8_E5")) else (f"quantised ({dtype})", _ORIGINAL)


def _by_dtype(tensor: TensorInfo, names: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """What a tensor's dtype gives away; buffers of whole numbers (ids, masks, counters) do not."""
    if tensor.dtype in NARROW_FLOAT:
        return _narrow(tensor.dtype)
    if tensor.dtype not in INTEGER:
        return None
    stem = re.sub("_(blocks|scales)$", "", tensor.name)
    if {f"{stem}_blocks", f"{stem}_scales"} <= names.keys():
        return "mxfp4", _MXFP4
    if tensor.dtype == "U8" and f"{tensor.name}_scale" in names:
        return "BitNet (1-bit)", _ORIGINAL
    last = tensor.name.rpartition(".")[2]
    packed = tensor.dtype in _PACKING and len(tensor.shape) >= 2 and not _BUFFER.fullmatch(last)
    return ("integer", _ORIGINAL) if last == "weight" or packed else None


def _evidence(checkpoint: Checkpoint) -> Iterator[tuple[TensorInfo, str, str]]:
    """Tensors that give quantisation away, those whose names say which kind before those whose dtype does."""
    for tensor in checkpoint.tensors.values():
        if (found := _by_name(tensor.name)) is not None:
            yield tensor, *found
    for tensor in checkpoint.tensors.values():
        if (found := _by_dtype(tensor, checkpoint.tensors)) is not None:
            yield tensor, *found


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are stored in fewer than 16 bits or as whole numbers.

    What config.json says comes first, then names and dtypes of tensors. Integer buffers (position ids, masks,
    index tables) are no weights.

    Raises:
        InputError: Names the format, a tensor, and the way out.
    """
    evidence = next(_evidence(checkpoint), None)
    method = _configured(checkpoint.config)
    if evidence is None and method is None:
        return
    tensor, *found = evidence or (None, "", "")
    what, way_out = found if method is None else _METHODS.get(method, (shown(method), _ORIGINAL))
    where = "config.json" if tensor is None else f"tensor {shown(tensor.name)}, {tensor.dtype}"
    raise InputError(
        f"{checkpoint.label} has {what} weights ({where}), and floats of 16 bits or more are "
        f"needed; {way_out}"
    )
