"""The MoE families: where an architecture keeps its experts, and the sizes of a routed block.

Part of the format (`format.py` hands these names on); it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
class Family:
    """Where one architecture keeps its experts, in the checkpoint and in config.json.

    `experts_prefix` and `router_name` take `{layer}`. `*_name` are the projections' module names
    inside one expert. `*_key` are config.json keys. `fused_prefix` is the prefix of the layout
    with one `gate_up_proj` [E, 2F, D] and one `down_proj` [E, D, F] tensor for all experts.
    """

    name: str
    model_type: str
    architecture: str
    experts_prefix: str
    fused_prefix: str
    router_name: str
    gate_name: str
    up_name: str
    down_name: str
    num_experts_key: str
    expert_width_key: str
    top_k_key: str

    @property
    def factored_architecture(self) -> str:
        """The `architectures` entry of a factored checkpoint of this family."""
        return self.architecture.replace("ForCausalLM", "MoESVDForCausalLM")

    def projection_name(self, projection: Projection) -> str:
        """Module name of a projection inside one expert, e.g. `w1`."""
        return {"gate": self.gate_name, "up": self.up_name, "down": self.down_name}[projection]

    def expert_tensor(self, layer: int, expert: int, projection: Projection) -> str:
        """Full checkpoint name of one expert's projection."""
        prefix = self.experts_prefix.format(layer=layer)
        return f"{prefix}.{expert}.{self.projection_name(projection)}.weight"

    def moe_shape(self, config: Mapping[str, Any]) -> MoEShape:
        """Read the block sizes from a config.json; raises FormatError naming the key."""
        values = {}
        for field, key in (
            ("hidden_size", "hidden_size"),
            ("expert_width", self.expert_width_key),
            ("num_experts", self.num_experts_key),
            ("top_k", self.top_k_key),
        ):
            values[field] = positive_int(config, key, where="config.json")
        if values["top_k"] > values["num_experts"]:
            raise FormatError(
                f"config.json: {self.top_k_key} is {values['top_k']}, more than the "
                f"{values['num_experts']} experts of {self.num_experts_key}"
            )
        return MoEShape(**values)


FAMILIES: Final[tuple[Family, ...]] = (
    Family(
        name="mixtral",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        experts_prefix="model.layers.{layer}.block_sparse_moe.experts",
        fused_prefix="model.layers.{layer}.mlp.experts",
        router_name="model.layers.{layer}.block_sparse_moe.gate.weight",
        gate_name="w1",
        up_name="w3",
        down_name="w2",
        num_experts_key="num_local_experts",
        expert_width_key="intermediate_size",
        top_k_key="num_experts_per_tok",
    ),
)


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
