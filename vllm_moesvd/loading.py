"""From the tensors of a checkpoint to the parameters of a model, each accounted for.

vLLM 0.32 loads a checkpoint with missing experts, half-width experts or unknown expert tensors
without a word and serves uninitialised memory. So every tensor that config.json promises, dense
parts included, goes through a `Ledger`: it must arrive exactly once and with the right shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn.functional import pad

from vllm_moesvd.compressed import quantised_weights
from vllm_moesvd.format import (
    CONFIG_KEY,
    CheckpointSpec,
    Family,
    FormatError,
    MoEShape,
    dense_layer_tensors,
    layer_tensors,
    parse_spec,
)

LM_HEAD: Final = "lm_head.weight"
WEIGHT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""Anything else would be converted to numbers that mean nothing without their scales."""
IGNORED_SUFFIX: Final = "rotary_emb.inv_freq"
"""A buffer that old checkpoints carry and that vLLM computes itself."""


class LoadingError(ValueError):
    """The tensors of a checkpoint are not the ones its config.json promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """What config.json says about the routed experts: the sizes, and each factored layer."""

    family: Family
    shape: MoEShape
    num_layers: int
    moe_layers: tuple[int, ...]
    spec: CheckpointSpec


def read_plan(family: Family, hf_config: Any) -> ModelPlan:
    """Check the `moesvd` key of a loaded config; raises FormatError in one line."""
    values = hf_config.to_dict()
    untested = family.unsupported(values)
    if untested is not None:
        raise FormatError(f"moesvd: config.json: {untested}")
    family.routing_groups(values)
    shape = family.moe_shape(values)
    num_layers = values["num_hidden_layers"]
    spec = parse_spec(values.get(CONFIG_KEY), shape, num_layers)
    pattern = family.layer_pattern(values)
    moe_layers = tuple(i for i in range(num_layers) if pattern.has_experts(i))
    for layer in spec.layers:
        if layer not in moe_layers:
            raise FormatError(f"moesvd: layer {layer} has no routed experts, it cannot be factored")
    return ModelPlan(
        family=family, shape=shape, num_layers=num_layers, moe_layers=moe_layers, spec=spec
    )


def expected_tensors(plan: ModelPlan, hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every tensor of the checkpoint.

    The parts that are not routed experts are those of transformers' own model class, built
    without memory; this is independent of the vLLM model they will be loaded into.
    """
    from transformers import AutoModelForCausalLM

    family = plan.family
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config))
    expected: dict[str, tuple[int, ...]] = {}
    modules = {
        family.fused_prefix.format(layer=i).removesuffix("experts"): i for i in plan.moe_layers
    }
    for name, tensor in model.state_dict().items():
        # `model.layers.7.mlp.` of `model.layers.7.mlp.gate.weight`
        module = ".".join(name.split(".")[:4]) + "."
        if module not in modules:
            expected[name] = tuple(tensor.shape)
        elif not name.startswith(f"{module}experts."):
            expected[family.published_name(modules[module], name)] = tuple(tensor.shape)
    for layer in plan.moe_layers:
        spec = plan.spec.layers.get(layer)
        if spec is None:
            expected |= dense_layer_tensors(plan.shape, family, layer)
        else:
            expected |= layer_tensors(spec, plan.shape, family, layer)
    return expected


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Which promised tensors have arrived. `optional` ones may be absent, not wrong."""

    expected: Mapping[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()
    quantised: Mapping[str, torch.dtype] = field(default_factory=dict)
    """The types of tensors that come with a scale."""
    arrived: set[str] = field(default_factory=set)

    def receive(self, name: str, shape: Iterable[int]) -> None:
        """Record one tensor; raises LoadingError if it is unknown, misshapen or a repetition."""
        found = list(shape)
        if name not in self.expected:
            raise LoadingError(
                f"moesvd: tensor {name}: found with shape {found}, but config.json promises no "
                "such tensor; the weights and config.json are not from the same checkpoint"
            )
        expected = list(self.expected[name])
        if found != expected:
            raise LoadingError(
                f"moesvd: tensor {name}: found shape {found}, expected {expected} by config.json"
            )
        if name in self.arrived:
            raise LoadingError(
                f"moesvd: tensor {name}: found twice, expected once; remove the weight file that "
                "does not belong to the checkpoint"
            )
        self.arrived.add(name)

    def close(self) -> None:
        """Raise LoadingError unless every promised tensor has arrived."""
        missing = [n for n in self.expected if n not in self.arrived and n not in self.optional]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LoadingError(
                f"moesvd: tensor {missing[0]}{more}: not found, expected shape "
                f"{list(self.expected[missing[0]])} by config.json; download the checkpoint again"
            )


def open_ledger(plan: ModelPlan, hf_config: Any) -> Ledger:
    """A ledger of everything the checkpoint of this config must hold."""
    tied = bool(getattr(hf_config, "tie_word_embeddings", False))
    expected = expected_tensors(plan, hf_config)
    quantised, scales = quantised_weights(hf_config, _dense_parts(plan, expected))
    return Ledger(
        expected=expected | scales,
        quantised=quantised,
        optional=frozenset({LM_HEAD} if tied else ()),
    )


def _dense_parts(
    plan: ModelPlan, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors that are no routed experts."""
    experts = tuple(f"{plan.family.experts_prefix.format(layer=i)}." for i in plan.moe_layers)
    return {name: shape for name, shape in expected.items() if not name.startswith(experts)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """The parameter of a factor tensor, and the whole size [..] that its loader expects.

    A factor is padded with zeros at the end of each dimension to `full_shape`; None leaves the
    padding to the parameter's own loader.
    """

    parameter: torch.nn.Parameter
    full_shape: tuple[int, ...] | None

    def load(self, tensor: torch.Tensor) -> None:
        if self.full_shape is not None:
            tensor = pad_to(tensor, self.full_shape)
        self.parameter.weight_loader(self.parameter, tensor)  # type: ignore[attr-defined]


def route_tensors(
    weights: Iterable[tuple[str, torch.Tensor]],
    ledger: Ledger,
    destinations: Mapping[str, Destination],
    core_shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Check every tensor, load the factors, and pass on what vLLM's own loader takes.

    `core_shapes` are the sizes that vLLM was built for of those experts that must be padded.
    """
    for name, tensor in weights:
        if name.endswith(IGNORED_SUFFIX):
            continue
        ledger.receive(name, tensor.shape)
        expected_dtypes = (ledger.quantised[name],) if name in ledger.quantised else WEIGHT_DTYPES
        if tensor.dtype not in expected_dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected_dtypes)
            raise LoadingError(
                f"moesvd: tensor {name}: found {tensor.dtype}, expected {names}; only what "
                "quantization_config of config.json names can be quantised, and no experts"
            )
        if name in destinations:
            destinations[name].load(tensor)
        else:
            yield name, pad_to(tensor, core_shapes[name]) if name in core_shapes else tensor


def pad_to(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Append zeros to every dimension until the tensor has `shape`."""
    if tuple(tensor.shape) == shape:
        return tensor
    widths: list[int] = []
    for size, target in zip(reversed(tensor.shape), reversed(shape), strict=True):
        widths += [0, target - size]
    return pad(tensor, widths)


def factor_loader(
    *, shard_dim: int | None, tp_rank: int, rows: tuple[int, ...] | None = None
) -> Callable[[torch.nn.Parameter, torch.Tensor], None]:
    """A weight loader for a factor of which this process holds a part; `rows` None means all.

    vLLM's weight reload asks loaders for their `__name__` and binds their `param` anew, so it is
    neither a partial nor are its arguments named otherwise.
    """

    def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if rows is not None:
            loaded_weight = loaded_weight[list(rows)]
        load_padded_slice(param, loaded_weight, shard_dim=shard_dim, tp_rank=tp_rank)

    return load


def load_padded_slice(
    parameter: torch.nn.Parameter,
    tensor: torch.Tensor,
    *,
    shard_dim: int | None,
    tp_rank: int,
) -> None:
    """Copy this process's slice of a whole factor; what the slice lacks becomes zero.

    Example: 5 rows in parameters of 3 rows: process 0 takes rows 0-2, process 1 rows 3, 4 and a
    row of zeros.
    """
    if shard_dim is not None:
        size, available = parameter.shape[shard_dim], tensor.shape[shard_dim]
        start = min(tp_rank * size, available)
        tensor = tensor.narrow(shard_dim, start, min(size, available - start))
    if tensor.shape != parameter.shape:
        parameter.data.zero_()
    parameter.data[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
