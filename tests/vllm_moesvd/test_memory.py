"""What one process holds of real models' layers: built by vLLM without memory, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks.moe_layers import MODELS, Model
from tests.checkpoints import mixtral_config
from tests.vllm_moesvd import harness
from vllm_moesvd import layer as layer_module
from vllm_moesvd.format import (
    CONFIG_KEY,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    spec_to_json,
)

REMOVED = 0.4
TOLERANCE = 0.02


def forms(model: Model) -> dict[int, LayerSpec]:
    """One layer of each form at about the sizes of `REMOVED`, as multiples of what kernels want.

    vLLM's kernels want a multiple of 32 neurons in every process, so a width that is no multiple
    of 256 costs eight processes up to 255 more.
    """
    own = tuple(range(model.num_experts))
    r, q = model.ranks(REMOVED)
    svd_r, svd_q = model.ranks(REMOVED, "svd")
    base_r, base_q = model.ranks(REMOVED, "base-delta")
    narrow = int((1 - REMOVED) * model.expert_width) // 256 * 256
    latent = int((1 - REMOVED) * model.hidden_size) // 64 * 64
    return {
        0: LatentSpec(rank_gate_up=latent, rank_down=latent, width=model.expert_width),
        1: NarrowSpec(width=narrow),
        2: FactoredSpec(rank_gate_up=r, rank_down=q, expert_slot=own, slot_group=(0,) * len(own)),
        3: FactoredSpec(
            rank_gate_up=svd_r, rank_down=svd_q, expert_slot=own, slot_group=own, form="svd"
        ),
        4: FactoredSpec(
            rank_gate_up=base_r,
            rank_down=base_q,
            expert_slot=own,
            slot_group=(0,) * len(own),
            base_width=model.expert_width,
            form="base-delta",
        ),
    }


def numbers(model: Model, tp_size: int, folder: Path, monkeypatch: Any) -> dict[str, int]:
    """Elements of every tensor of the routed experts that process 0 of `tp_size` holds."""
    from vllm.distributed import parallel_state

    config = mixtral_config(
        architectures=["MixtralMoESVDForCausalLM"],
        hidden_size=model.hidden_size,
        intermediate_size=model.expert_width,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        **{CONFIG_KEY: spec_to_json(CheckpointSpec(layers=forms(model)))},
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    engine = harness.engine_config(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        tensor_parallel_size=tp_size,
        skip_tokenizer_init=True,
    )
    harness.initialize_distributed(engine)
    alone = parallel_state._TP
    others = {"world_size": tp_size, "rank_in_group": 0}
    with monkeypatch.context() as patched, torch.device("meta"):
        # A group of this one process that says it were one of several; nothing is exchanged.
        patched.setattr(parallel_state, "_TP", SimpleNamespace(**(vars(alone) | others)))
        built = harness.build_model(engine)
    assert all(parameter.is_meta for parameter in built.parameters())
    return {
        name: parameter.numel()
        for name, parameter in built.named_parameters()
        if ".experts." in name
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_tensor_falls_with_the_number_of_processes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(model, 1, tmp_path / "tp", monkeypatch)
    kinds = {name.rpartition("experts.")[2] for name in whole}
    assert {"w13_weight", "w2_weight"} <= {name.rpartition(".")[2] for name in kinds}
    assert sum("u_gate" in name for name in whole) == 3
    for tp_size in (2, 4, 8):
        part = numbers(model, tp_size, tmp_path / "tp", monkeypatch)
        assert part.keys() == whole.keys()
        for name, size in whole.items():
            assert abs(part[name] * tp_size / size - 1) <= TOLERANCE, (name, tp_size)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_padding_of_a_gpu_is_less_than_a_tile_per_process(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a process's share of a rank is a multiple of 16, whatever the rank is."""
    exact = numbers(model, 8, tmp_path / "tp", monkeypatch)
    monkeypatch.setattr(layer_module, "rank_multiple", lambda: 16)
    padded = numbers(model, 8, tmp_path / "tp", monkeypatch)
    for index in (2, 3, 4):
        spec = forms(model)[index]
        assert isinstance(spec, FactoredSpec)
        largest = 16 * 8 / min(spec.rank_gate_up, spec.rank_down)
        for name, size in exact.items():
            if f".layers.{index}." in name:
                assert size <= padded[name] < size * (1 + largest)
