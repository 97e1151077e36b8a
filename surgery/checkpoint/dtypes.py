"""What the dtype codes of the safetensors format mean (format description: the safetensors README)."""

from typing import TYPE_CHECKING

from surgery.errors import InputError

if TYPE_CHECKING:
    import torch

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by code."""

FLOAT = frozenset({"F64", "F32", "F16", "BF16"})
"""Codes of the floating-point numbers that weights are computed in; the narrower ones need scales."""

NARROW_FLOAT = frozenset({"F4", "F6_E2M3", "F6_E3M2"} | {code for code in BITS if code.startswith("F8_")})
"""Codes of floating-point numbers that are a quantised weight's storage."""

INTEGER = frozenset(code for code in BITS if code[0] in "IU")
"""Codes of whole numbers; truth values are not among them."""

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def torch_dtype(code: str) -> "torch.dtype":
    """The torch dtype of a code.

    Raises:
        InputError: torch has no such dtype with one element per item (`F4`, `F6_*`, older releases of torch).
    """
    import torch

    dtype = getattr(torch, _TORCH.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            f"found dtype {code}, which torch {torch.__version__} cannot read; use a bf16 checkpoint"
        )
    return dtype


def code_of(dtype: "torch.dtype") -> str:
    """The code of a torch dtype.

    Raises:
        InputError: The format has no code for it (quantised and double-precision complex dtypes).
    """
    name = str(dtype).removeprefix("torch.")
    for code, known in _TORCH.items():
        if known == name:
            return code
    raise InputError(
        f"found dtype {name}, which safetensors cannot hold; convert the tensor to a plain dtype"
    )
