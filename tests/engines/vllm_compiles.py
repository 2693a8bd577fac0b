"""Compiles the kernel for a card that is not there, for each type and with a residual or without:
prints how many bytes of code each came to."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimtab.engines import kernel
from trimtab.engines.forms import MOST

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(number: str, stream: bool) -> int:
    signature = {
        "into": (number, "i32"),
        "beside": (number, "i32"),
        "bank": ("*fp32", "*i32", "*i32", "*fp32"),
        "lanes_of": ("*i32", "*fp32", "i32", "*i32"),
        "noted": "*fp32",
        "width": "i32",
        **dict.fromkeys(("STREAM", "MOST", "BLOCK"), "constexpr"),
    }
    fixed = {"STREAM": stream, "MOST": MOST, "BLOCK": 4096}
    source = ASTSource(triton.jit(kernel._steer_rows), signature, constexprs=fixed)
    return len(triton.compile(source, target=HOPPER, options={"num_warps": 8}).asm["cubin"])


if __name__ == "__main__":
    types = ("*bf16", "*fp16", "*fp32")
    print(json.dumps([compiled(number, stream) for number in types for stream in (True, False)]))
