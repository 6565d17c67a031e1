"""The runner of a `latent` layer: what multiplies x is one operator, the experts take z = V x.

Of a layer's matrices four multiply the same tokens: the router, V, gate and up of the shared
experts, and the gate of a shared expert that has one. On a GPU they are one launch as long as
tokens are few (`joined.py`); elsewhere, and where one of them is quantised, vLLM's own modules.

vLLM's runner applies the router to what the experts take, and shared experts inside its opaque
operator. So both are taken out of it: `forward` hands it z, logits of x, and as the input of
shared experts their output, which its operator does not see and the runner's own code then scales,
adds and all-reduces as vLLM does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_moesvd import kernels
from vllm_moesvd.joined import joined_linear
from vllm_moesvd.kernels.plan import JOINED_HEIGHTS

SHARED_MLPS: Final = ("Qwen2MoeMLP", "DeepseekV2MLP")
"""vLLM's shared experts that are `down(silu(gate x) * up x)`, the first with a gate of one row."""


class LatentRunner(MoERunner):  # type: ignore[misc]
    """vLLM's runner, with the router and the shared experts applied to x before it."""

    def __init__(
        self,
        *args: Any,
        router_gate: torch.nn.Module | None,
        shared_mlp: torch.nn.Module | None,
        **kwargs: Any,
    ) -> None:
        """`router_gate` None: the model calls its router itself, see `take_over_routers`."""
        # The model owns these modules; as attributes their weights would get a second name.
        object.__setattr__(self, "router_gate", router_gate)
        object.__setattr__(self, "shared_mlp", shared_mlp)
        super().__init__(*args, **kwargs)
        self.is_joined: bool | None = None
        v = self.routed_input_transform
        if isinstance(v.quant_method, UnquantizedLinearMethod):
            v.quant_method = LatentInputMethod(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output [T, D]; `router_logits` is used only where the model has kept its router."""
        x_TD = hidden_states
        project = self._project_jointly if self.is_joined else self._project
        logits_TE, z_TR, shared_TD = project(x_TD)
        output_TD: torch.Tensor = super().forward(
            z_TR,
            router_logits if logits_TE is None else logits_TE,
            input_ids,
            # That it is given tells vLLM that z is no x.
            x_TD if shared_TD is None else shared_TD,
        )
        return output_TD

    def _select_forward(self) -> Callable[..., Any]:
        entry: Callable[..., Any] = super()._select_forward()
        return entry if self.shared_mlp is None else _with_shared_output(entry)

    def prepare(self) -> None:
        """Once, after loading: decide whether products are joined, and compile their programs."""
        if self.is_joined is not None:
            return
        parts, weight_RD = self._parts(), self.routed_input_transform.weight
        self.is_joined = (
            len(parts) > 1
            and kernels.can_run(weight_RD)
            and not envs.VLLM_BATCH_INVARIANT
            and all(_is_plain(part, weight_RD.dtype) for part in parts)
            and getattr(self.router_gate, "out_dtype", None)
            in (None, weight_RD.dtype, torch.float32)
        )
        if self.is_joined:
            # The other weights need not be here yet, and values do not matter.
            columns = [len(part.weight) for part in parts]
            blank = weight_RD.new_zeros(max(columns), weight_RD.shape[1])
            for tokens in JOINED_HEIGHTS:
                weights = [blank[:count] for count in columns]
                joined_linear(blank.new_zeros(tokens, blank.shape[1]), weights, self._has_wide())

    def _parts(self) -> list[Any]:
        """The linear layers that multiply x; the router comes first if it is here."""
        mlp = self.shared_mlp
        shared = [] if mlp is None else [mlp.gate_up_proj, getattr(mlp, "expert_gate", None)]
        found = [self.router_gate, self.routed_input_transform, *shared]
        return [part for part in found if part is not None]

    def _has_wide(self) -> bool:
        """Whether the first product is the router's, in fp32 beside matrices of 16 bits."""
        return getattr(self.router_gate, "out_dtype", None) == torch.float32

    def _project(
        self, x_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        gate, logits_TE = self.router_gate, None
        if gate is not None:
            logits_TE = gate.logits(x_TD) if isinstance(gate, IdleGate) else gate(x_TD)[0]
        z_TR = self.routed_input_transform(x_TD)
        return logits_TE, z_TR, None if self.shared_mlp is None else self.shared_mlp(x_TD)

    def _project_jointly(
        self, x_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        weights = [part.weight for part in self._parts()]
        products = joined_linear(x_TD, weights, self._has_wide())
        # Indices, because Dynamo cannot trace `list.pop`.
        logits_TE = None if self.router_gate is None else products[0]
        z_TR, *shared = products if logits_TE is None else products[1:]
        if self.routed_input_transform.tp_size > 1:
            z_TR = tensor_model_parallel_all_gather(z_TR)
        if not shared:
            return logits_TE, z_TR, None
        mlp = self.shared_mlp
        shared_TD = mlp.down_proj(mlp.act_fn(shared[0]))[0]
        if len(shared) > 1:
            shared_TD = torch.sigmoid(shared[1]) * shared_TD
        return logits_TE, z_TR, shared_TD


class LatentInputMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """How V is held and applied alone; after loading its runner is made ready."""

    def __init__(self, runner: LatentRunner) -> None:
        super().__init__()
        self.runner = runner

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.runner.prepare()


class IdleGate(GateLinear):  # type: ignore[misc]
    """A router that the runner applies: when its block calls it, it computes nothing."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """What stands for the logits; the runner does not use it."""
        return x, None

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The logits [T, E], of the type that the block's own call would have given."""
        logits_TE: torch.Tensor = super().forward(x_TD)[0]
        return logits_TE


def take_over_routers(model: torch.nn.Module) -> None:
    """Let the runners of latent layers apply the routers that their blocks call themselves.

    The module keeps its place, names and loaders; its class alone becomes one that is idle.
    """
    for block in model.modules():
        runner = getattr(block, "experts", None)
        if isinstance(runner, LatentRunner) and runner.router_gate is None:
            gate: Any = getattr(block, "gate", None)
            # Another class than vLLM's own is some platform's, which we cannot stand in for.
            if type(gate) is GateLinear and gate.return_bias:
                gate.__class__ = IdleGate
                object.__setattr__(runner, "router_gate", gate)


def takes_shared(shared_experts: torch.nn.Module | None) -> bool:
    """Whether the runner computes these shared experts; others, and quantised ones, vLLM does."""
    return (
        type(shared_experts).__name__ in SHARED_MLPS
        and shared_experts is not None
        and isinstance(shared_experts.gate_up_proj.quant_method, UnquantizedLinearMethod)  # type: ignore[union-attr]
    )


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    return (
        isinstance(linear.quant_method, UnquantizedLinearMethod)
        and linear.bias is None
        and linear.weight.dtype == dtype
        and linear.weight.is_contiguous()
    )


def _with_shared_output(entry: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The runner's operator, and beside its output that of the shared experts, as vLLM's other
    operator returns it."""

    def both(
        z_TR: torch.Tensor, logits_TE: torch.Tensor, shared_TD: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return shared_TD, entry(z_TR, logits_TE, None, *rest)

    return both
