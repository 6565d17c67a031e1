"""The one place where kernels are started, so that a test can record launches instead."""

from __future__ import annotations

from typing import Any

import triton


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Start `kernel` on `grid` with all its arguments by name, compile options included."""
    kernel[grid](**arguments)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 `tl.dot` is wrong.

    The interpreter (Triton 3.9) multiplies the bit patterns; the kernels then convert both
    operands to fp32, which changes no number: a product of two bfloat16 is exact in fp32.
    """
    return bool(triton.knobs.runtime.interpret)


def work(name: str, flops: int, num_bytes: int) -> dict[str, Any]:
    """What Triton's profiler shows for a launch: upper bounds from shapes, never from values."""
    return {"name": name, "flops16": flops, "bytes": num_bytes}
