"""The per-batch half of D2-MoE's base pruning, for evaluation: `eval --dynamic-prune SHARE`.

For every batch the base of a layer loses the neurons that matter least to that batch, on top of
what `--base-prune` removed for good; the deltas stay. A neuron's importance is the one of the
static part, Σ g² h_j² ‖down_j‖² over the batch's routed tokens, with h by the base alone.

It saves no memory, since the next batch may need the neuron, and the result of a token depends on
what else is in its batch. A server that batches requests as they come, inside CUDA graphs of fixed
shapes, can do neither, so factored checkpoints are served without it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import linear

from compress_tool.checkpoint import Checkpoint
from compress_tool.errors import UsageError
from vllm_moesvd.format import FactoredSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicCheckpoint(Checkpoint):
    """A checkpoint that is evaluated with a share of every base's neurons left out per batch."""

    dynamic_prune: float


def with_dynamic_prune(checkpoint: Checkpoint, share: float) -> DynamicCheckpoint:
    """The same checkpoint, evaluated so; raises UsageError where there is no base to prune."""
    if not 0 < share < 1:
        raise UsageError(f"--dynamic-prune is {share:g}, expected a share between 0 and 1")
    specs = {} if checkpoint.spec is None else checkpoint.spec.layers
    if not any(isinstance(spec, FactoredSpec) and spec.base_width for spec in specs.values()):
        raise UsageError(
            f"--dynamic-prune leaves out neurons of a base, and {checkpoint.path} has none; "
            "only `run --method d2-moe` writes one"
        )
    values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    return DynamicCheckpoint(**values, dynamic_prune=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicBase:
    """The base of one layer: `gate_up_BD` [2B, D] (gate, then up), `down_DB`; B neurons."""

    gate_up_BD: torch.Tensor
    down_DB: torch.Tensor
    share: float

    def left_out(self, experts: Any, x_TD: torch.Tensor, gate_TK: torch.Tensor) -> LeftOut:
        """What one batch does without; `experts` gives the activation."""
        energy_B = self._energy(experts, x_TD, gate_TK)
        width = self.down_DB.shape[1]
        neuron = energy_B.argsort(stable=True)[: round(self.share * width)].sort().values
        return LeftOut(
            neuron=neuron,
            gate_up=self.gate_up_BD[torch.cat([neuron, width + neuron])],
            down=self.down_DB[:, neuron],
        )

    def _energy(self, experts: Any, x_TD: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        h_TB: torch.Tensor = experts._apply_gate(linear(x_TD, self.gate_up_BD)).double()
        weight_T = gate_TK.double().square().sum(dim=1)
        return (weight_T @ h_TB.square()) * self.down_DB.double().square().sum(dim=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """N neurons (`neuron`, ascending) and their part of the base: [2N, D] and [D, N].

    Every expert's folded weights contain the base; what it adds is taken out of the products.
    """

    neuron: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def take_from_neurons(self, a_TF: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """`x W_gate_up`, [T, 2F], without the base's part."""
        columns = torch.cat([self.neuron, a_TF.shape[1] // 2 + self.neuron])
        return a_TF.index_add(1, columns, linear(x_TD, self.gate_up), alpha=-1)

    def take_from_output(self, y_TD: torch.Tensor, h_TF: torch.Tensor) -> torch.Tensor:
        """`h W_down`, [T, D], without the base's part."""
        return y_TD - linear(h_TF[:, self.neuron], self.down)


def dynamic_base(
    checkpoint: Checkpoint, layer: int, device: torch.device, dtype: torch.dtype
) -> DynamicBase | None:
    """The base to prune per batch, or None: no such evaluation was asked, or no base."""
    spec = checkpoint.layer_spec(layer)
    if not isinstance(checkpoint, DynamicCheckpoint) or not isinstance(spec, FactoredSpec):
        return None
    if spec.base_width == 0:
        return None
    prefix = checkpoint.family.experts_prefix.format(layer=layer)
    gate_BD, up_BD, down_DB = (
        checkpoint.read(f"{prefix}.moesvd.base_{projection}").to(device, dtype)
        for projection in ("gate", "up", "down")
    )
    return DynamicBase(
        gate_up_BD=torch.cat([gate_BD, up_BD]), down_DB=down_DB, share=checkpoint.dynamic_prune
    )
