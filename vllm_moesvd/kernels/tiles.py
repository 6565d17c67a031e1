"""Tile sizes from checked-in tables: one JSON file per GPU architecture, never tuned at run time.

A table has a list of buckets for each element size. A bucket serves launches with at most
`max_rows` rows per key (a key is the slot or group whose matrix the rows are multiplied with).
The choice depends on shapes alone, so it is the same whenever a CUDA graph is captured.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

FOLDER: Final = Path(__file__).parent / "tiles"
FALLBACK: Final = "fallback"
MAX_SPLIT: Final = 8
"""A split costs one fp32 partial result; more than 8 cost more than they bring at any size."""
PROGRAMS_PER_UNIT: Final = 4
"""What `target_programs` counts for each multiprocessor."""

_logger = logging.getLogger("vllm.moesvd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Compile-time sizes of one kernel; `group_m` row blocks share a column tile in the L2."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The tiles for launches with at most `max_rows` rows per key; None is no limit."""

    max_rows: int | None
    block_m: int
    linear: Tile
    gate_up: Tile


@dataclass(frozen=True, kw_only=True, slots=True)
class TileTable:
    """The buckets of one architecture and element size, ascending; the last has no limit."""

    buckets: tuple[Bucket, ...]
    target_programs: int
    """Fewer programs than this leave multiprocessors idle, so the depth is split."""

    def __post_init__(self) -> None:
        limits = [bucket.max_rows for bucket in self.buckets]
        finite = [limit for limit in limits if limit is not None]
        if limits[-1:] != [None] or finite != sorted(set(finite)) or len(finite) + 1 != len(limits):
            raise ValueError(f"moesvd: tile buckets {limits}: expected ascending, then one null")

    def bucket(self, num_rows: int, num_keys: int) -> Bucket:
        """The tiles for `num_rows` rows spread over `num_keys` matrices."""
        rows = -(-num_rows // num_keys)
        return next(b for b in self.buckets if b.max_rows is None or rows <= b.max_rows)

    def split(self, programs: int, depth: int, block_k: int, num_rows: int) -> int:
        """In how many parts a product of `num_rows` over `depth` is summed; a power of two.

        Each part keeps at least four steps, which is what the pipeline needs to fill. Where the
        partial results are more than an eighth of the matrix that is read, it is split only as far
        as multiprocessors would have nothing to do.
        """
        parts = 1
        while parts < MAX_SPLIT and depth >= 2 * parts * 4 * block_k:
            is_cheap = 8 * 2 * parts * num_rows <= 2 * depth // 8
            target = self.target_programs if is_cheap else self.target_programs // PROGRAMS_PER_UNIT
            if programs * parts >= target:
                break
            parts *= 2
        return parts


@cache
def tile_table(arch: str, element_bytes: int) -> TileTable:
    """The table of an architecture such as `sm_90`; the fallback, logged once, if it has none."""
    file = FOLDER / f"{arch}.json"
    if not file.exists():
        _logger.warning(
            "moesvd: no tile table for %s in %s; the conservative one is used", arch, FOLDER
        )
        file = FOLDER / f"{FALLBACK}.json"
    entry = json.loads(file.read_text(encoding="utf-8"))[f"{element_bytes * 8}-bit"]
    return TileTable(
        buckets=tuple(_bucket(bucket) for bucket in entry["buckets"]),
        target_programs=entry["target_programs"],
    )


@cache
def device_arch(index: int) -> str:
    """`sm_90`, `gfx942`, … of a GPU of this machine."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _bucket(entry: dict[str, Any]) -> Bucket:
    return Bucket(
        max_rows=entry["max_rows"],
        block_m=entry["block_m"],
        linear=Tile(**entry["linear"]),
        gate_up=Tile(**entry["gate_up"]),
    )
