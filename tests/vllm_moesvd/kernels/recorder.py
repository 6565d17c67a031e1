"""Records what the launcher would start, for layers that have shapes and no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.vllm_moesvd.kernels.compiler import Launch
from tests.vllm_moesvd.kernels.layers import Sizes, call_without_data
from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.tiles import TileTable


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this context kernels are not started but appended to the list."""
    launches: list[Launch] = []
    original = launching.launch

    def record(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
        launches.append(Launch(kernel, grid, arguments))

    launching.launch = record
    try:
        yield launches
    finally:
        launching.launch = original


def launches_of(
    sizes: Sizes, tokens: int, table: TileTable, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    with recording() as launches:
        call_without_data(sizes, tokens, table, dtype, "meta")
    return launches
