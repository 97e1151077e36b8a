"""Compile every kernel for a GPU that need not be there, and write as JSON what came of it (see test_compiled.py)."""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from surgery.kernels import (
    difference_triton,
    rank_update_triton,
    rerouting_triton,
    vocabulary_entropy_triton,
)
from surgery.kernels.rounders import GRID

PAIR, SUMS = {"a": "in", "b": "in"}, {"largest": "*fp32", "total": "*fp32", "moment": "*fp32"}
PRODUCT = {"BM": difference_triton._BM, "BN": difference_triton._BN, "B": difference_triton._MOST}
STAGED = {"num_stages": difference_triton._STAGES}
LOGITS = {"BT": 32, "BV": 64, "BD": 64, "WIDEN": False}
ROWS = {"BR": rerouting_triton._BR, "BD": rerouting_triton._BD}
EDIT = {"anchor": "in", "out": "in", "intended": "*fp32", "right": "*fp32"}
COUNTS = {"active": "*i32", "noises": "*fp64", "anchors": "*fp64", "changes": "*i64"}
BLOCK = {"BM": rank_update_triton._BM, "BN": rank_update_triton._BN, "B": 32}
COSINES = {"cosine": "*fp32", "norm": "*fp32", "original_norm": "*fp32"}

# (kernel, types of its pointers, constants, options); sizes and strides are int32.
KERNELS = [
    (difference_triton._right, {**PAIR, "x": "*fp32", "y": "*fp32"}, PRODUCT, STAGED),
    (difference_triton._left, {**PAIR, "y": "*fp32", "z": "*fp32"}, PRODUCT, STAGED),
    (difference_triton._gram, {**PAIR, "x": "*fp32", "y": "*fp32", "z": "*fp32"}, PRODUCT, STAGED),
    (difference_triton._energy, {**PAIR, "out": "*fp64"}, {"BM": PRODUCT["BM"], "BN": PRODUCT["BN"]}, STAGED),
    (vocabulary_entropy_triton._sums, {"h": "in", "w": "in", **SUMS}, {**LOGITS, "STRETCH": 2048}, {}),
    (
        vocabulary_entropy_triton._gradient,
        {"h": "in", "w": "in", **SUMS, "upstream": "*fp32", "out": "*fp32"},
        LOGITS,
        {},
    ),
    *(
        (
            rank_update_triton._update,
            {**EDIT, **COUNTS, "scaled": "*fp32", "probe": "*fp32", "products": "*fp32", "seed": "i64"},
            {**BLOCK, "SIGNIFICAND": GRID[torch.bfloat16][0], "SMALLEST": GRID[torch.bfloat16][1], **modes},
            {},
        )
        for modes in (
            {"STOCHASTIC": False, "STORE": True},
            {"STOCHASTIC": True, "STORE": True},
            {"STOCHASTIC": False, "STORE": False},
        )
    ),
    (rank_update_triton._image, {**EDIT, "factor": "*fp32", "image": "*fp32"}, BLOCK, {}),
    (rerouting_triton._cosines, {**PAIR, **COSINES, "mask": "*i8"}, ROWS, {}),
    (rerouting_triton._gradient, {**PAIR, **COSINES, "upstream": "*fp32", "out": "in"}, ROWS, {}),
]


def built(kernel, pointers, constants, options, dtype):
    """What the compiled kernel needs and what its dot products are made of."""
    # The JIT takes a stride of 1 for a constant, and so should this.
    constants = constants | {name: 1 for name in kernel.arg_names if name.endswith("_col")}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32").replace("in", f"*{dtype}")
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # So do sizes and addresses that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place in range(len(signature)) if (place,) not in values
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    products = set(re.findall(r"mma\S*\.(tf32|bf16)\.", made.asm["ptx"]))
    return {"shared": made.metadata.shared, "products": sorted(products)}


if __name__ == "__main__":
    found = {
        f"{number}.{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}.{dtype}": built(
            kernel, pointers, constants, options, dtype
        )
        for number, (kernel, pointers, constants, options) in enumerate(KERNELS)
        for dtype in ("fp32", "bf16")
    }
    json.dump(found, sys.stdout)
