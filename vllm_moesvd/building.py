"""Builds the factored layers while vLLM builds its own model.

vLLM's model classes call `FusedMoEFactory` by name. While one of our models is being built, that
name is bound to a function that looks the layer up in config.json and calls the real factory with
other keyword arguments. This is the only thing in vLLM that is replaced; nothing else is touched,
and the name is bound back when the model is built.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from types import ModuleType
from typing import Any, Final

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, MoERunner
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up

from vllm_moesvd.base_delta import BaseDeltaRoutedExperts
from vllm_moesvd.cpu_experts import CpuExperts
from vllm_moesvd.cpu_packed import BASE, FACTORS
from vllm_moesvd.format import PROJECTIONS, FactoredSpec, LatentSpec, LayerSpec, NarrowSpec
from vllm_moesvd.latent import LatentOutput, latent_input
from vllm_moesvd.latent_runner import LatentRunner, takes_shared
from vllm_moesvd.layer import FactoredRoutedExperts
from vllm_moesvd.loading import Destination, ModelPlan

FACTORY_NAME: Final = "FusedMoEFactory"
KERNEL_MULTIPLE: Final = 32
"""vLLM's CPU kernel takes hidden sizes that are multiples of 32 and pads widths to it. More is
safe and costs memory; for bf16 it also makes rows multiples of 64 bytes."""
UNSUPPORTED_ARGUMENTS: Final = (
    "has_bias",
    "apply_router_weight_on_input",
    "routed_input_transform",
    "routed_output_transform",
    "routed_experts_cls",
    "runner_cls",
    "runner_args",
    "zero_expert_type",
    "shared_expert_gate",
    "fuse_shared_experts",
    "is_sequence_parallel",
)
"""What a model may ask of its experts and the factored layers have not been taught."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltLayer:
    """A factored layer and the vLLM module that computes it."""

    index: int
    spec: LayerSpec
    runner: MoERunner


@contextmanager
def factored_layers(
    model_class: type, plan: ModelPlan, *, replicate: bool
) -> Iterator[list[BuiltLayer]]:
    """Within this context a model of `model_class` is built with the layers of `plan`.

    Yields the list to which every factored layer is added as it is built.
    """
    modules = _modules_with_factory(model_class)
    built: list[BuiltLayer] = []
    signature = inspect.signature(FusedMoEFactory)

    def factory(*args: Any, **kwargs: Any) -> MoERunner:
        call = signature.bind(*args, **kwargs).arguments
        index = extract_layer_index(call["prefix"])
        spec = plan.spec.layers.get(index)
        with _no_adapters_on_experts():
            if spec is None:
                return FusedMoEFactory(**call | _dense_arguments())
            _refuse_unsupported(call)
            runner = FusedMoEFactory(**call | _arguments(spec, call, replicate))
        built.append(BuiltLayer(index=index, spec=spec, runner=runner))
        return runner

    for module in modules:
        setattr(module, FACTORY_NAME, factory)
    try:
        yield built
    finally:
        for module in modules:
            setattr(module, FACTORY_NAME, FusedMoEFactory)


def destinations(layer: BuiltLayer, plan: ModelPlan) -> dict[str, Destination]:
    """Where the factor tensors of a layer go, by full checkpoint name."""
    prefix = f"{plan.family.experts_prefix.format(layer=layer.index)}.moesvd."
    if isinstance(layer.spec, FactoredSpec):
        experts = layer.runner.routed_experts
        return {
            prefix + name: Destination(parameter=getattr(experts, name), full_shape=None)
            for name in (FACTORS + BASE if layer.spec.base_width else FACTORS)
        }
    if isinstance(layer.spec, NarrowSpec):
        return {}
    v, output = layer.runner.routed_input_transform, layer.runner.routed_output_transform
    found = {
        f"{prefix}v_gate_up": Destination(
            parameter=v.weight, full_shape=(v.output_size, v.input_size)
        ),
        f"{prefix}q_down": Destination(
            parameter=output.project.weight,
            full_shape=(output.project.output_size, output.project.input_size),
        ),
    }
    if layer.spec.bias:
        found[f"{prefix}bias_down"] = Destination(parameter=output.bias_D, full_shape=None)
    return found


def core_shapes(layer: BuiltLayer, plan: ModelPlan) -> dict[str, tuple[int, ...]]:
    """Padded size of the experts of a latent or narrow layer, by full checkpoint name."""
    if isinstance(layer.spec, FactoredSpec):
        return {}
    config = layer.runner.moe_config
    hidden, width = config.hidden_dim, config.intermediate_size_per_partition * config.tp_size
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        plan.family.expert_tensor(layer.index, expert, projection): sizes[projection]
        for expert in range(plan.shape.num_experts)
        for projection in PROJECTIONS
    }


def _arguments(spec: LayerSpec, call: dict[str, Any], replicate: bool) -> dict[str, Any]:
    """The keyword arguments of the real factory that make a layer of form `spec`."""
    # Under expert parallelism every process has all neurons of its experts.
    tp_size = 1 if _splits_experts() else get_tensor_model_parallel_world_size()
    if isinstance(spec, FactoredSpec):
        return {
            "intermediate_size": round_up(call["intermediate_size"], tp_size),
            "routed_experts_cls": BaseDeltaRoutedExperts
            if spec.base_width
            else FactoredRoutedExperts,
            "routed_experts_args": {"spec": spec, "replicate": replicate},
        }
    width = round_up(spec.width, KERNEL_MULTIPLE * tp_size)
    arguments: dict[str, Any] = {"intermediate_size": width}
    if current_platform.is_cpu():
        arguments["routed_experts_cls"] = CpuExperts
    if isinstance(spec, NarrowSpec):
        return arguments
    return arguments | _latent_arguments(spec, call, replicate)


def _splits_experts() -> bool:
    """Whether processes have different experts, not different parts of every expert."""
    parallel = get_current_vllm_config().parallel_config
    processes = (
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * parallel.prefill_context_parallel_size
    )
    return bool(parallel.enable_expert_parallel) and processes > 1


def _dense_arguments() -> dict[str, Any]:
    """What the experts of a dense layer need beside what the model says of them."""
    if current_platform.is_cpu() and _splits_experts():
        # vLLM's own would read weights out of bounds.
        return {"routed_experts_cls": CpuExperts}
    return {}


@contextmanager
def _no_adapters_on_experts() -> Iterator[None]:
    """Build experts as without `--enable-lora`: adapters are for attention only, and vLLM would
    choose kernels that add them to experts, which a CPU does not have."""
    config = get_current_vllm_config()
    if config.lora_config is None:
        yield
        return
    without = copy.copy(config)
    without.lora_config = None
    with set_current_vllm_config(without):
        yield


def _latent_arguments(spec: LatentSpec, call: dict[str, Any], replicate: bool) -> dict[str, Any]:
    tp_size = get_tensor_model_parallel_world_size()
    rank = round_up(max(spec.rank_gate_up, spec.rank_down), lcm(KERNEL_MULTIPLE, tp_size))
    hidden_size, prefix = call["hidden_size"], call["prefix"]
    dtype = call.get("params_dtype")
    if spec.bias and call.get("apply_routed_scale_to_output"):
        # In fp16 vLLM divides everything else by the scale, and there is no hook for the bias.
        _refuse_half_precision(call)
    shared, taken = call.get("shared_experts"), None
    if takes_shared(shared):
        shared, taken = None, shared
    return {
        "hidden_size": rank,
        "gate": None,
        "shared_experts": shared,
        "runner_cls": LatentRunner,
        "runner_args": {"router_gate": call.get("gate"), "shared_mlp": taken},
        "routed_input_transform": latent_input(
            hidden_size,
            rank,
            dtype=dtype,
            prefix=f"{prefix}.routed_input_transform",
            replicate=replicate,
        ),
        "routed_output_transform": LatentOutput(
            rank,
            hidden_size,
            has_bias=spec.bias,
            dtype=dtype,
            prefix=f"{prefix}.routed_output_transform",
            replicate=replicate,
            reduces_late=not replicate
            or call.get("shared_experts") is not None
            or not call.get("reduce_results", True),
        ),
    }


def _refuse_half_precision(call: dict[str, Any]) -> None:
    if torch.get_default_dtype() == torch.float16:
        raise ValueError(
            f"moesvd: {call['prefix']}: layers with an output bias and a routed scaling factor are "
            "not supported in float16; use --dtype bfloat16"
        )


def _refuse_unsupported(call: dict[str, Any]) -> None:
    used = [name for name in UNSUPPORTED_ARGUMENTS if call.get(name)]
    if call.get("activation", "silu") != "silu":
        used.append(f"activation={call['activation']}")
    if used:
        raise ValueError(
            f"moesvd: {call['prefix']}: this model builds its experts with {', '.join(used)}, "
            "which factored layers do not support"
        )


def _modules_with_factory(model_class: type) -> list[ModuleType]:
    """The modules of vLLM in which `model_class` and its bases look the factory up."""
    modules = {sys.modules[base.__module__] for base in model_class.__mro__}
    found = [m for m in modules if vars(m).get(FACTORY_NAME) is FusedMoEFactory]
    if not found:
        raise RuntimeError(
            f"moesvd: {model_class.__name__} does not build its experts with {FACTORY_NAME}; "
            "this vLLM is not one that vllm-moesvd supports"
        )
    return found
