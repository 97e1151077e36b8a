"""Weights that are stored quantised: block-scaled fp8 is described, every other format is refused.

An edit of the others would be lost or would corrupt them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
        (r"_scale_inv$", "block-scaled fp8", _FP8),
        (r"\.weight_packed$", "compressed-tensors", _ORIGINAL),
        (r"\.W_q$", "HQQ", _ORIGINAL),
        (r"\.weight_scale_2$", "nvfp4", _ORIGINAL),
        (r"\.(codebooks|Qidxs)$", "vector-quantised", _ORIGINAL),
    )
)

_SCALE = "_scale_inv"
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})

_BUFFER = re.compile(
    r"(.*[._])?(bias|masked_bias|mask|ids?|index|indices|idx|position|positions|lengths?|num_batches_tracked|tid2eid)"
)
_PACKING = INTEGER - {"I64", "U64"}


@dataclass(frozen=True)
class Scaling:
    """How a weight is stored in block-scaled fp8: its values are its codes times the scale of their block.

    Attributes:
        name: Of the tensor that holds the scales, one for each block.
        block: Rows and columns of a block; the last ones may be smaller.
        powers_of_two: Whether every scale is one (`scale_fmt: ue8m0`).
    """

    name: str
    block: tuple[int, int]
    powers_of_two: bool = False

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of shape `shape`."""
        blocks = (-(-size // block) for size, block in zip(shape[-2:], self.block, strict=True))
        return (*shape[:-2], *blocks)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of quantisation, at the top or for a part (text_config and the like)."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if isinstance(settings := part.get("quantization_config"), dict):
            return {"quant_method": "quantised", **settings}
        if isinstance(part.get("compression_config"), dict):
            return {"quant_method": "compressed-tensors"}
    return {}


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size of block-scaled e4m3 weights, None for any other format."""
    block = settings.get("weight_block_size")
    if settings.get("quant_method") != "fp8" or settings.get("fmt", "e4m3") != "e4m3":
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return None
    return block[0], block[1]


def scalings(checkpoint: Checkpoint) -> dict[str, Scaling]:
    """How each block-scaled fp8 weight of a checkpoint is stored, by its name; no tensor is read.

    Raises:
        InputError: The scales of a weight do not have the shape that the block size in config.json gives.
    """
    settings = _settings(checkpoint.config)
    block, found = _block(settings), dict[str, Scaling]()
    if block is None:
        return found
    for weight in checkpoint.tensors.values():
        scales = checkpoint.tensors.get(weight.name + _SCALE)
        if weight.dtype != "F8_E4M3" or scales is None or scales.dtype not in _SCALE_DTYPES:
            continue
        scaling = Scaling(scales.name, block, settings.get("scale_fmt") == "ue8m0")
        if len(weight.shape) not in (2, 3) or scales.shape != scaling.grid(weight.shape):
            raise InputError(
                f"{shown(scales.name)} in {checkpoint.label} has shape {list(scales.shape)}, and blocks of "
                f"{list(block)} in {list(weight.shape)} need another; correct weight_block_size in config.json"
            )
        found[weight.name] = scaling
    return found


def _method(settings: Mapping[str, Any]) -> str:
    method = str(settings["quant_method"])
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


def _evidence(checkpoint: Checkpoint, scaled: Mapping[str, Scaling]) -> Iterator[tuple[TensorInfo, str, str]]:
    """Tensors that give quantisation away, those whose names say which kind before those whose dtype does."""
    known = {*scaled, *(scaling.name for scaling in scaled.values())}
    tensors = [tensor for name, tensor in checkpoint.tensors.items() if name not in known]
    for tensor in tensors:
        if (found := _by_name(tensor.name)) is not None:
            yield tensor, *found
    for tensor in tensors:
        if (found := _by_dtype(tensor, checkpoint.tensors)) is not None:
            yield tensor, *found


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are stored in fewer than 16 bits or as whole numbers.

    What config.json says comes first, then names and dtypes of tensors. Integer buffers (position ids, masks,
    index tables) are no weights. Block-scaled fp8 passes where `scalings` describes all of it.

    Raises:
        InputError: Names the format, a tensor, and the way out.
    """
    scaled = scalings(checkpoint)
    evidence = next(_evidence(checkpoint, scaled), None)
    settings = _settings(checkpoint.config)
    method = _method(settings) if settings else None
    if evidence is None and (method is None or scaled):
        return
    tensor, *found = evidence or (None, "", "")
    what, way_out = found if method is None else _METHODS.get(method, (shown(method), _ORIGINAL))
    where = "config.json" if tensor is None else f"tensor {shown(tensor.name)}, {tensor.dtype}"
    raise InputError(
        f"{checkpoint.label} has {what} weights ({where}), and floats of 16 bits or more are "
        f"needed; {way_out}"
    )
