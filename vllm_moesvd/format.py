"""The checkpoint format: what `config.json["moesvd"]` says and which tensors follow from it.

This file is the specification shared by the writer (`compress_tool`) and the reader
(`vllm_moesvd`). It imports the standard library only, so both sides, and any third party, can
load it without torch or vLLM. The prose version is `docs/format.md`.

A factored checkpoint is an ordinary Hugging Face folder. A layer that is not listed keeps its
dense tensors. A listed layer has one of the forms below; `D` is the hidden size, `F` the expert
width, `E` the number of experts, `R` a rank, `G` V groups, `S` slots:

* `latent`: `z = V x`, experts work on `z` and return `R` numbers, `Q` maps them back to `D`.
  The cores keep the family's standard expert names, with `R` in the place of `D`. They may also
  have fewer neurons (`width`) than the dense experts.
* `narrow`: dense experts with `width` neurons each, under their standard names.
* `shared-v` and `svd`: `W_e = U[slot(e)] @ V[group(slot(e))]` for each of the three projections.
  Experts with the same slot are the same function. `svd` is the case of one group per slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

FORMAT_VERSION: Final = 1
CONFIG_KEY: Final = "moesvd"
FACTOR_PREFIX: Final = "moesvd."
"""Factor tensors are named `<experts prefix>.moesvd.<factor>`: no vLLM mapper rewrites that."""

Projection = Literal["gate", "up", "down"]
PROJECTIONS: Final[tuple[Projection, ...]] = ("gate", "up", "down")

_LAYER_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")


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
            values[field] = _positive_int(config, key, where="config.json")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec:
    """One V for gate and up of all experts, one Q for the summed output, per-expert cores."""

    rank_gate_up: int
    rank_down: int
    width: int
    bias: bool = False

    form: Literal["latent"] = "latent"


@dataclass(frozen=True, kw_only=True, slots=True)
class NarrowSpec:
    """Every expert of the layer keeps `width` of its neurons."""

    width: int

    form: Literal["narrow"] = "narrow"


@dataclass(frozen=True, kw_only=True, slots=True)
class FactoredSpec:
    """Per-slot U and per-group V for each projection.

    `expert_slot[e]` is the slot of expert e; `slot_group[s]` the V group of slot s. Example: four
    experts, the last three sharing one function, all on one V:
    `expert_slot=(0, 1, 1, 1), slot_group=(0, 0)`.
    """

    rank_gate_up: int
    rank_down: int
    expert_slot: tuple[int, ...]
    slot_group: tuple[int, ...]

    form: Literal["shared-v", "svd"] = "shared-v"

    @property
    def num_slots(self) -> int:
        return len(self.slot_group)

    @property
    def num_groups(self) -> int:
        return max(self.slot_group) + 1


LayerSpec = LatentSpec | NarrowSpec | FactoredSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """Everything `config.json["moesvd"]` says: the factored layers by index, ascending."""

    layers: Mapping[int, LayerSpec]


def spec_to_json(spec: CheckpointSpec) -> dict[str, Any]:
    """The value of `config.json["moesvd"]`; `parse_spec` is its inverse."""
    layers: dict[str, Any] = {}
    for index in sorted(spec.layers):
        layer = spec.layers[index]
        entry: dict[str, Any] = {"form": layer.form}
        if not isinstance(layer, NarrowSpec):
            entry |= {"rank_gate_up": layer.rank_gate_up, "rank_down": layer.rank_down}
        if not isinstance(layer, FactoredSpec):
            entry["width"] = layer.width
        if isinstance(layer, LatentSpec):
            entry["bias"] = layer.bias
        if isinstance(layer, FactoredSpec):
            entry["expert_slot"] = list(layer.expert_slot)
            entry["slot_group"] = list(layer.slot_group)
        layers[str(index)] = entry
    return {"format_version": FORMAT_VERSION, "layers": layers}


def parse_spec(value: Any, shape: MoEShape, num_layers: int) -> CheckpointSpec:
    """Read and check `config.json["moesvd"]` against the model's sizes.

    Raises FormatError with the layer, the key, what was found and what was expected.
    """
    if not isinstance(value, Mapping):
        raise FormatError(f"moesvd: expected an object, found {_show(value)}")
    version = value.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"moesvd: format_version is {_show(version)}, this version reads {FORMAT_VERSION}; "
            "install the vllm-moesvd release that wrote the checkpoint"
        )
    _only_keys(value, {"format_version", "layers"}, "moesvd")
    entries = value.get("layers")
    if not isinstance(entries, Mapping) or not entries:
        raise FormatError(f"moesvd: layers must be a non-empty object, found {_show(entries)}")
    layers: dict[int, LayerSpec] = {}
    for key, entry in entries.items():
        if not (isinstance(key, str) and _LAYER_INDEX.fullmatch(key)):
            raise FormatError(f"moesvd: {_show(key)} is not a layer index")
        if int(key) >= num_layers:
            raise FormatError(f"moesvd: layer {key} does not exist, the model has {num_layers}")
        layers[int(key)] = _parse_layer(entry, shape, f"moesvd layer {key}")
    return CheckpointSpec(layers=dict(sorted(layers.items())))


def layer_tensors(
    spec: LayerSpec, shape: MoEShape, family: Family, layer: int
) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every routed-experts tensor that a factored layer has."""
    prefix = family.experts_prefix.format(layer=layer)
    return {f"{prefix}.{name}": size for name, size in _factor_shapes(spec, shape, family).items()}


def dense_layer_tensors(shape: MoEShape, family: Family, layer: int) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every routed-experts tensor that a dense layer has."""
    d, f = shape.hidden_size, shape.expert_width
    sizes: dict[Projection, tuple[int, int]] = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    return {
        family.expert_tensor(layer, expert, projection): sizes[projection]
        for expert in range(shape.num_experts)
        for projection in PROJECTIONS
    }


def _factor_shapes(spec: LayerSpec, shape: MoEShape, family: Family) -> dict[str, tuple[int, ...]]:
    d, f = shape.hidden_size, shape.expert_width
    if isinstance(spec, NarrowSpec):
        return _core_shapes(shape.num_experts, spec.width, d, d, family)
    r, q = spec.rank_gate_up, spec.rank_down
    if isinstance(spec, LatentSpec):
        shapes: dict[str, tuple[int, ...]] = {"moesvd.v_gate_up": (r, d), "moesvd.q_down": (d, q)}
        if spec.bias:
            shapes["moesvd.bias_down"] = (d,)
        return shapes | _core_shapes(shape.num_experts, spec.width, r, q, family)
    s, g = spec.num_slots, spec.num_groups
    return {
        "moesvd.v_gate": (g, r, d),
        "moesvd.v_up": (g, r, d),
        "moesvd.v_down": (g, q, f),
        "moesvd.u_gate": (s, f, r),
        "moesvd.u_up": (s, f, r),
        "moesvd.u_down": (s, d, q),
    }


def _core_shapes(
    num_experts: int, width: int, size_in: int, size_out: int, family: Family
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(num_experts):
        shapes[f"{expert}.{family.gate_name}.weight"] = (width, size_in)
        shapes[f"{expert}.{family.up_name}.weight"] = (width, size_in)
        shapes[f"{expert}.{family.down_name}.weight"] = (size_out, width)
    return shapes


def _parse_layer(entry: Any, shape: MoEShape, where: str) -> LayerSpec:
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where}: expected an object, found {_show(entry)}")
    form = entry.get("form")
    d, f = shape.hidden_size, shape.expert_width
    if form == "latent":
        _only_keys(entry, {"form", "rank_gate_up", "rank_down", "width", "bias"}, where)
        bias = entry.get("bias", False)
        if not isinstance(bias, bool):
            raise FormatError(f"{where}: bias must be true or false, found {_show(bias)}")
        return LatentSpec(
            rank_gate_up=_bounded(entry, "rank_gate_up", d, where),
            rank_down=_bounded(entry, "rank_down", d, where),
            width=_bounded(entry, "width", f, where),
            bias=bias,
        )
    if form == "narrow":
        _only_keys(entry, {"form", "width"}, where)
        return NarrowSpec(width=_bounded(entry, "width", f, where))
    if form not in ("shared-v", "svd"):
        raise FormatError(
            f"{where}: form is {_show(form)}, expected latent, narrow, shared-v or svd"
        )
    _only_keys(entry, {"form", "rank_gate_up", "rank_down", "expert_slot", "slot_group"}, where)
    expert_slot = _int_list(entry, "expert_slot", where)
    slot_group = _int_list(entry, "slot_group", where)
    if len(expert_slot) != shape.num_experts:
        raise FormatError(
            f"{where}: expert_slot has {len(expert_slot)} entries for {shape.num_experts} experts"
        )
    if sorted(set(expert_slot)) != list(range(len(slot_group))):
        raise FormatError(
            f"{where}: expert_slot must use every slot from 0 to {len(slot_group) - 1}"
        )
    # Not a comparison with range(): one huge entry must not cost memory.
    if len(set(slot_group)) != max(slot_group) + 1:
        raise FormatError(f"{where}: slot_group must use every group from 0 to {max(slot_group)}")
    if form == "svd" and slot_group != tuple(range(len(slot_group))):
        raise FormatError(f"{where}: form svd needs slot_group 0, 1, 2, … (one group per slot)")
    return FactoredSpec(
        rank_gate_up=_bounded(entry, "rank_gate_up", d, where),
        rank_down=_bounded(entry, "rank_down", f, where),
        expert_slot=expert_slot,
        slot_group=slot_group,
        form=form,
    )


def _bounded(entry: Mapping[str, Any], key: str, largest: int, where: str) -> int:
    value = _positive_int(entry, key, where=where)
    if value > largest:
        raise FormatError(f"{where}: {key} is {value}, the largest possible is {largest}")
    return value


def _positive_int(entry: Mapping[str, Any], key: str, *, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or value < 1:
        raise FormatError(f"{where}: {key} must be a positive integer, found {_show(value)}")
    return value


def _int_list(entry: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = entry.get(key)
    if not isinstance(value, list) or not value or any(type(v) is not int or v < 0 for v in value):
        raise FormatError(f"{where}: {key} must be a list of integers ≥ 0, found {_show(value)}")
    return tuple(value)


def _only_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise FormatError(f"{where}: unknown key {', '.join(unknown[:5])}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
