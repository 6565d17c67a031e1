"""What a factored model adds to vLLM's own class of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.platforms import current_platform

from vllm_moesvd.building import core_shapes, destinations, factored_layers
from vllm_moesvd.engine_config import replicate_option
from vllm_moesvd.format import Family
from vllm_moesvd.latent_runner import take_over_routers
from vllm_moesvd.loading import open_ledger, read_plan, route_tensors


class FactoredModel:
    """Mixin before a model class of vLLM: builds factored layers and loads them.

    Forward, attention, scheduling interfaces and quantisation of the rest are the base class's.
    """

    family: ClassVar[Family]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        hf_config = vllm_config.model_config.hf_config
        plan = read_plan(self.family, hf_config)
        for key, value in self.family.implied.items():
            if getattr(hf_config, key, None) is None:
                setattr(hf_config, key, value)
        # vLLM writes into the config while it builds (DeepSeek's rope_type becomes a name that
        # transformers does not know); the ledger asks transformers, of the config as it was.
        given_config = copy.deepcopy(hf_config)
        with factored_layers(type(self), plan, replicate=replicate_option(vllm_config)) as built:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        take_over_routers(self)  # type: ignore[arg-type]
        built_indices = {layer.index for layer in built}
        absent = sorted(set(plan.spec.layers) - built_indices)
        if absent and get_pp_group().world_size == 1:
            raise ValueError(
                f"moesvd: config.json factors layer {absent[0]}, which has no routed experts in "
                f"{type(self).__name__}"
            )
        self._plan, self._built, self._hf_config = plan, built, given_config

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a whole checkpoint, the first or another of the same sizes (vLLM's weight reload).

        Returns the names of the parameters that got their values.
        Raises LoadingError unless each tensor of the checkpoint arrives exactly once, so a
        checkpoint cannot be loaded in parts.
        """
        if current_platform.is_cpu():
            _forget_kernels(self)
        ledger = open_ledger(self._plan, self._hf_config)
        targets = {
            name: target
            for layer in self._built
            for name, target in destinations(layer, self._plan).items()
        }
        cores = {
            name: shape
            for layer in self._built
            for name, shape in core_shapes(layer, self._plan).items()
        }
        # By name, and before loading: a weight reload replaces the parameters while it loads.
        factors = {id(target.parameter) for target in targets.values()}
        named = self.named_parameters()  # type: ignore[attr-defined]
        filled = {name for name, parameter in named if id(parameter) in factors}
        loaded: set[str] = super().load_weights(  # type: ignore[misc]
            route_tensors(weights, ledger, targets, cores)
        )
        ledger.close()
        return loaded | filled


class BiasedHead:
    """For vLLM 0.32's PhiMoE, which loads the bias of lm_head and leaves it out of the logits."""

    logits_processor: Any
    lm_head: Any

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, vocabulary] of hidden states [T, D]; None in all but the first process."""
        logits: torch.Tensor | None = self.logits_processor(
            self.lm_head, hidden_states, self.lm_head.bias
        )
        return logits


def _forget_kernels(model: Any) -> None:
    """Let vLLM pack the weights of its own experts again.

    For a CPU vLLM 0.32 packs them where it builds their kernel, which it does not when weights are
    reloaded: its dense Mixtral then computes with unpacked weights, and says nothing.
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None
