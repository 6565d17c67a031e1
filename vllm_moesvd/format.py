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
* `base-delta`: as `shared-v`, plus dense base weights of `B` neurons that all experts share:
  `W_e = base + U[slot(e)] @ V[group(slot(e))]`, where the base is added to the first `B` of the
  `F` neurons (rows of gate and up, columns of down).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vllm_moesvd.families import FAMILIES as FAMILIES
from vllm_moesvd.family import Family as Family
from vllm_moesvd.moe_block import PROJECTIONS as PROJECTIONS
from vllm_moesvd.moe_block import FormatError as FormatError
from vllm_moesvd.moe_block import LayerPattern as LayerPattern
from vllm_moesvd.moe_block import MoEShape as MoEShape
from vllm_moesvd.moe_block import Projection as Projection
from vllm_moesvd.moe_block import positive_int, show

FORMAT_VERSION: Final = 1
CONFIG_KEY: Final = "moesvd"
FACTOR_PREFIX: Final = "moesvd."
"""Factor tensors are named `<experts prefix>.moesvd.<factor>`: no vLLM mapper rewrites that."""

_LAYER_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")


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
    """Per-slot U and per-group V for each projection, and for `base-delta` a shared base.

    `expert_slot[e]` is the slot of expert e; `slot_group[s]` the V group of slot s. Example: four
    experts, the last three sharing one function, all on one V:
    `expert_slot=(0, 1, 1, 1), slot_group=(0, 0)`.
    """

    rank_gate_up: int
    rank_down: int
    expert_slot: tuple[int, ...]
    slot_group: tuple[int, ...]

    base_width: int = 0
    """Neurons of the base; 0 for every form but `base-delta`."""

    form: Literal["shared-v", "svd", "base-delta"] = "shared-v"

    @property
    def num_slots(self) -> int:
        return len(self.slot_group)

    @property
    def num_groups(self) -> int:
        return max(self.slot_group) + 1

    @property
    def shares_slots(self) -> bool:
        """Whether experts share a slot, so that a token can meet it twice; slot -1 is none."""
        return sum(slot >= 0 for slot in self.expert_slot) > self.num_slots


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
            if layer.form == "base-delta":
                entry["base_width"] = layer.base_width
        layers[str(index)] = entry
    return {"format_version": FORMAT_VERSION, "layers": layers}


def parse_spec(value: Any, shape: MoEShape, num_layers: int) -> CheckpointSpec:
    """Read and check `config.json["moesvd"]` against the model's sizes.

    Raises FormatError with the layer, the key, what was found and what was expected.
    """
    if not isinstance(value, Mapping):
        raise FormatError(f"moesvd: expected an object, found {show(value)}")
    version = value.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"moesvd: format_version is {show(version)}, this version reads {FORMAT_VERSION}; "
            "install the vllm-moesvd release that wrote the checkpoint"
        )
    _only_keys(value, {"format_version", "layers"}, "moesvd")
    entries = value.get("layers")
    if not isinstance(entries, Mapping) or not entries:
        raise FormatError(f"moesvd: layers must be a non-empty object, found {show(entries)}")
    layers: dict[int, LayerSpec] = {}
    for key, entry in entries.items():
        if not (isinstance(key, str) and _LAYER_INDEX.fullmatch(key)):
            raise FormatError(f"moesvd: {show(key)} is not a layer index")
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
        latent: dict[str, tuple[int, ...]] = {"moesvd.v_gate_up": (r, d), "moesvd.q_down": (d, q)}
        if spec.bias:
            latent["moesvd.bias_down"] = (d,)
        return latent | _core_shapes(shape.num_experts, spec.width, r, q, family)
    s, g = spec.num_slots, spec.num_groups
    shapes: dict[str, tuple[int, ...]] = {
        "moesvd.v_gate": (g, r, d),
        "moesvd.v_up": (g, r, d),
        "moesvd.v_down": (g, q, f),
        "moesvd.u_gate": (s, f, r),
        "moesvd.u_up": (s, f, r),
        "moesvd.u_down": (s, d, q),
    }
    if spec.base_width:
        b = spec.base_width
        base = {"base_gate": (b, d), "base_up": (b, d), "base_down": (d, b)}
        shapes |= {f"moesvd.{name}": size for name, size in base.items()}
    return shapes


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
        raise FormatError(f"{where}: expected an object, found {show(entry)}")
    form = entry.get("form")
    d, f = shape.hidden_size, shape.expert_width
    if form == "latent":
        _only_keys(entry, {"form", "rank_gate_up", "rank_down", "width", "bias"}, where)
        bias = entry.get("bias", False)
        if not isinstance(bias, bool):
            raise FormatError(f"{where}: bias must be true or false, found {show(bias)}")
        return LatentSpec(
            rank_gate_up=_bounded(entry, "rank_gate_up", d, where),
            rank_down=_bounded(entry, "rank_down", d, where),
            width=_bounded(entry, "width", f, where),
            bias=bias,
        )
    if form == "narrow":
        _only_keys(entry, {"form", "width"}, where)
        return NarrowSpec(width=_bounded(entry, "width", f, where))
    if form not in ("shared-v", "svd", "base-delta"):
        raise FormatError(
            f"{where}: form is {show(form)}, expected latent, narrow, shared-v, svd or base-delta"
        )
    keys = {"form", "rank_gate_up", "rank_down", "expert_slot", "slot_group"}
    _only_keys(entry, keys | ({"base_width"} if form == "base-delta" else set()), where)
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
        base_width=_bounded(entry, "base_width", f, where) if form == "base-delta" else 0,
        form=form,
    )


def _bounded(entry: Mapping[str, Any], key: str, largest: int, where: str) -> int:
    value = positive_int(entry, key, where=where)
    if value > largest:
        raise FormatError(f"{where}: {key} is {value}, the largest possible is {largest}")
    return value


def _int_list(entry: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = entry.get(key)
    if not isinstance(value, list) or not value or any(type(v) is not int or v < 0 for v in value):
        raise FormatError(f"{where}: {key} must be a list of integers ≥ 0, found {show(value)}")
    return tuple(value)


def _only_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise FormatError(f"{where}: unknown key {', '.join(unknown[:5])}")
