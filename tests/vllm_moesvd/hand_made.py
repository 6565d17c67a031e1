"""Factored Mixtral checkpoints made by hand, each with the dense checkpoint it stands for.

The factors come first and the dense weights are their product, so both are the same function by
construction. With `exact=True` one factor of each pair is a permutation: the product then is exact
in floating point. Otherwise the ranks and widths are odd numbers, which no kernel likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import write_checkpoint
from tests.families import BY_NAME, family_config, family_tensors
from vllm_moesvd.format import (
    CONFIG_KEY,
    PROJECTIONS,
    CheckpointSpec,
    FactoredSpec,
    Family,
    LatentSpec,
    LayerSpec,
    MoEShape,
    NarrowSpec,
    layer_tensors,
    spec_to_json,
)

MIXTRAL = BY_NAME["mixtral"]

EXACT_LAYERS: dict[int, LayerSpec] = {
    1: LatentSpec(rank_gate_up=64, rank_down=64, width=96),
    2: NarrowSpec(width=40),
    3: FactoredSpec(
        rank_gate_up=64, rank_down=64, expert_slot=(3, 0, 2, 1), slot_group=(0, 1, 0, 1)
    ),
    4: FactoredSpec(rank_gate_up=64, rank_down=64, expert_slot=(0, 1, 1, 1), slot_group=(0, 0)),
    5: FactoredSpec(
        rank_gate_up=64,
        rank_down=64,
        expert_slot=(2, 0, 3, 1),
        slot_group=(0, 1, 2, 3),
        form="svd",
    ),
}
ODD_LAYERS: dict[int, LayerSpec] = {
    1: LatentSpec(rank_gate_up=33, rank_down=21, width=45, bias=True),
    2: NarrowSpec(width=37),
    3: FactoredSpec(
        rank_gate_up=19, rank_down=27, expert_slot=(3, 0, 2, 1), slot_group=(0, 1, 0, 1)
    ),
    4: FactoredSpec(rank_gate_up=17, rank_down=23, expert_slot=(0, 1, 1, 2), slot_group=(0, 0, 0)),
    5: FactoredSpec(
        rank_gate_up=15,
        rank_down=13,
        expert_slot=(2, 0, 1, 1),
        slot_group=(0, 1, 2),
        form="svd",
    ),
}
ALL_FORMS = ODD_LAYERS | {
    0: FactoredSpec(
        rank_gate_up=9,
        rank_down=11,
        expert_slot=(0, 2, 1, 2),
        slot_group=(0, 1, 0),
        base_width=37,
        form="base-delta",
    )
}
"""No layer is dense; the base is narrower than the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HandMade:
    """A factored checkpoint and its dense twin, as config and tensors.

    `bias` are the vectors that a latent layer adds and no dense Mixtral can: they are missing in
    the dense twin.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    dense_config: dict[str, Any]
    dense_tensors: dict[str, torch.Tensor]
    bias: dict[int, torch.Tensor]

    def write(self, path: Path) -> Path:
        """The factored checkpoint in two shards."""
        return write_checkpoint(path, self.config, self.tensors, num_shards=2)

    def write_dense(self, path: Path) -> Path:
        return write_checkpoint(path, self.dense_config, self.dense_tensors)


def hand_made(
    layers: dict[int, LayerSpec],
    *,
    exact: bool,
    seed: int = 0,
    family: Family = MIXTRAL,
    **config_changes: Any,
) -> HandMade:
    """Six decoder layers; those in `layers` are factored, the others are dense."""
    dense_config = family_config(family.name, num_hidden_layers=6, **config_changes)
    shape = family.moe_shape(dense_config)
    dense = family_tensors(dense_config, seed)
    # Logits below one, so that an error of a log probability is an error of fp32 at 1.
    if "lm_head.weight" in dense:
        dense["lm_head.weight"] *= 0.25
    factored = dict(dense)
    generator = torch.Generator().manual_seed(seed + 1)
    bias: dict[int, torch.Tensor] = {}
    for layer, spec in layers.items():
        prefix = f"{family.experts_prefix.format(layer=layer)}."
        for name in [name for name in factored if name.startswith(prefix)]:
            del factored[name]
        factors = {
            name: _factor(name, size, exact, generator)
            for name, size in layer_tensors(spec, shape, family, layer).items()
        }
        factored |= factors
        bare = {name.removeprefix(prefix): tensor for name, tensor in factors.items()}
        for expert in range(shape.num_experts):
            weights = fold(spec, shape, bare, expert, family)
            for projection, weight in zip(PROJECTIONS, weights, strict=True):
                dense[family.expert_tensor(layer, expert, projection)] = weight
        if "moesvd.bias_down" in bare:
            bias[layer] = bare["moesvd.bias_down"]
    config = dense_config | {
        "architectures": [family.factored_architecture],
        CONFIG_KEY: spec_to_json(CheckpointSpec(layers=layers)),
    }
    return HandMade(
        config=config,
        tensors=factored,
        dense_config=dense_config,
        dense_tensors=dense,
        bias=bias,
    )


def fold(
    spec: LayerSpec,
    shape: MoEShape,
    factors: dict[str, torch.Tensor],
    expert: int,
    family: Family = MIXTRAL,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up [F, D] and down [D, F] of one expert in fp32, from factors by their bare names.

    Neurons that a narrower layer lacks are zeros.
    """
    if isinstance(spec, FactoredSpec):
        slot = spec.expert_slot[expert]
        group = spec.slot_group[slot]
        products = [
            factors[f"moesvd.u_{p}"][slot].double() @ factors[f"moesvd.v_{p}"][group].double()
            for p in ("gate", "up", "down")
        ]
        if spec.base_width:
            products[0][: spec.base_width] += factors["moesvd.base_gate"].double()
            products[1][: spec.base_width] += factors["moesvd.base_up"].double()
            products[2][:, : spec.base_width] += factors["moesvd.base_down"].double()
    else:
        names = [family.projection_name(projection) for projection in PROJECTIONS]
        products = [factors[f"{expert}.{name}.weight"].double() for name in names]
        if isinstance(spec, LatentSpec):
            v, q = factors["moesvd.v_gate_up"].double(), factors["moesvd.q_down"].double()
            products = [products[0] @ v, products[1] @ v, q @ products[2]]
    gate, up, down = products
    d, f = shape.hidden_size, shape.expert_width
    wide = [torch.zeros(f, d), torch.zeros(f, d), torch.zeros(d, f)]
    wide[0][: gate.shape[0]], wide[1][: up.shape[0]] = gate.float(), up.float()
    wide[2][:, : down.shape[1]] = down.float()
    return wide[0], wide[1], wide[2]


def _factor(
    name: str, size: tuple[int, ...], exact: bool, generator: torch.Generator
) -> torch.Tensor:
    """Random numbers that keep activations O(1); permutations for one factor of each pair."""
    if name.endswith("bias_down"):
        return torch.randn(size, generator=generator)
    is_permuted = name.rpartition(".")[2] in ("v_gate_up", "q_down", "v_gate", "v_up", "u_down")
    if exact and is_permuted:
        rows = size[-2]
        one = torch.eye(size[-1])
        blocks = [
            one[torch.randperm(size[-1], generator=generator)[:rows]]
            for _ in range(size[0] if len(size) == 3 else 1)
        ]
        return torch.stack(blocks).reshape(size).contiguous()
    return torch.randn(size, generator=generator) / size[-1] ** 0.5 * 1.3
