"""The parts of a routed block that architectures differ in, as data; standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal

Projection = Literal["gate", "up", "down"]
PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")


class FormatError(ValueError):
    """The `moesvd` entry of a config.json is not one this version can read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEShape:
    """Sizes of one routed-experts block: `D`, `F`, `E` and experts per token."""

    hidden_size: int
    expert_width: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingGroups:
    """Group-limited routing: experts in `count` equal runs, of which a token may use `used`.

    The best `scored` experts of a group decide how good the group is.
    """

    count: int
    used: int
    scored: int

    def problem(self, num_experts: int, top_k: int) -> str | None:
        """Why `num_experts` experts cannot be routed like this, or None."""
        if num_experts % self.count:
            return f"{num_experts} experts are not {self.count} equal groups"
        size = num_experts // self.count
        if size < self.scored:
            return f"groups of {size} experts are smaller than the {self.scored} that score one"
        if self.used > self.count or size * self.used < top_k:
            return f"{self.used} of {self.count} groups of {size} experts are less than top {top_k}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPattern:
    """Which decoder layers have routed experts: from `first` on the last of every `step`, but
    none of `dense`. Example: first 0, step 2, dense {3} gives layers 1, 5, 7, 9, …"""

    first: int = 0
    step: int = 1
    dense: frozenset[int] = frozenset()

    def has_experts(self, layer: int) -> bool:
        return layer >= self.first and (layer + 1) % self.step == 0 and layer not in self.dense


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpert:
    """An MLP beside the routed experts that every token passes: `<block>.<name>.gate_proj` etc.

    Its width is the product of the config's `width_keys`. `gate_name`, if any, is a linear layer
    [1, D] whose sigmoid scales it.
    """

    name: str
    width_keys: tuple[str, ...]
    gate_name: str | None = None

    def width(self, config: Mapping[str, Any]) -> int:
        """Its number of neurons; raises FormatError naming the key."""
        return prod(positive_int(config, key, where="config.json") for key in self.width_keys)


def positive_int(entry: Mapping[str, Any], key: str, *, where: str) -> int:
    """`entry[key]`; raises FormatError unless it is an integer above 0."""
    value = entry.get(key)
    if type(value) is not int or value < 1:
        raise FormatError(f"{where}: {key} must be a positive integer, found {show(value)}")
    return value


def show(value: Any) -> str:
    """A value as it goes into an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
