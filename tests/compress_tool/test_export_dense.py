"""export-dense: the ordinary checkpoint that computes what the factored one computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.errors import NumericsError, UnsupportedError, UsageError
from compress_tool.export_dense import export_dense
from compress_tool.manifest import source_identity
from compress_tool.packing import folded_expert
from compress_tool.verify import verify
from compress_tool.writer import OutputFolder, factored_config
from tests.checkpoints import tiny_mixtral
from tests.compress_tool.faults import killed_at
from tests.compress_tool.test_writer import digests
from vllm_moesvd.format import (
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    layer_tensors,
)

SPECS: dict[int, LayerSpec] = {
    0: LatentSpec(rank_gate_up=32, rank_down=24, width=50),
    1: FactoredSpec(rank_gate_up=16, rank_down=8, expert_slot=(0, 1, 1, 2), slot_group=(0, 0, 1)),
    2: NarrowSpec(width=40),
}


def factored(
    root: Path, specs: dict[int, LayerSpec], *, dtype: str = "float32", scale: float = 0.1
) -> Checkpoint:
    source = open_checkpoint(
        tiny_mixtral(root / "source", num_hidden_layers=4, dtype=dtype), allow_factored=False
    )
    generator = torch.Generator().manual_seed(0)
    with OutputFolder(root / "factored", job={}, num_layers=4) as output:
        for layer in range(4):
            tensors = None
            if layer in specs:
                sizes = layer_tensors(specs[layer], source.shape, source.family, layer)
                tensors = {
                    name: (torch.randn(size, generator=generator) * scale).to(getattr(torch, dtype))
                    for name, size in sizes.items()
                }
            output.save_layer_shard(layer, source, tensors, {})
        output.carry_over(source)
        output.finish(
            source=source,
            config=factored_config(source, CheckpointSpec(layers=specs)),
            source_record=source_identity(source),
            texts={},
        )
    return open_checkpoint(root / "factored", allow_factored=True)


def padded(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    result = torch.zeros(shape)
    result[: weight.shape[0], : weight.shape[1]] = weight
    return result


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_experts_are_the_folded_products_and_the_rest_is_copied(
    tmp_path: Path, stored: str, dtype: torch.dtype | None
):
    checkpoint = factored(tmp_path, SPECS, dtype=stored)
    layers: list[int] = []
    export_dense(checkpoint, tmp_path / "dense", dtype=dtype, progress=layers.append)
    dense = open_checkpoint(tmp_path / "dense", allow_factored=False)
    assert layers == [0, 1, 2, 3]
    target = dtype or getattr(torch, stored)
    assert dense.config["dtype"] == str(target).removeprefix("torch.")
    assert dense.config["architectures"] == ["MixtralForCausalLM"]
    assert "moesvd" not in dense.config
    for layer in range(3):
        for expert in range(4):
            weights = folded_expert(checkpoint, layer, expert)
            for projection, weight in zip(("gate", "up", "down"), weights, strict=True):
                exported = dense.expert_weight(layer, expert, projection)
                assert exported.dtype == target
                assert torch.equal(exported, padded(weight, exported.shape).to(target))
    for name in set(dense.tensors) & set(checkpoint.tensors):
        if name not in checkpoint.expert_tensors(0) + checkpoint.expert_tensors(2):
            assert torch.equal(dense.read(name), checkpoint.read(name, target))
    assert verify(tmp_path / "dense").problems == ()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_transformers_loads_the_export_completely(tmp_path: Path):
    export_dense(factored(tmp_path, SPECS), tmp_path / "dense")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()


def test_zero_neurons_change_nothing(tmp_path: Path):
    """What a padded expert computes is what the narrow one computes."""
    checkpoint = factored(tmp_path, {2: NarrowSpec(width=40)})
    export_dense(checkpoint, tmp_path / "dense")
    dense = open_checkpoint(tmp_path / "dense", allow_factored=False)
    x_TD = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))

    def outputs(weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        gate, up, down = weights
        return (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T

    narrow, wide = (outputs(folded_expert(c, 2, 1)) for c in (checkpoint, dense))
    # fp32 sums of 40 and of 40 + 56 zero terms: 1e-6 is some ten roundings.
    torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-6)
    assert narrow.abs().max() > 1e-3


def test_a_bias_cannot_be_exported_and_the_layers_are_named(tmp_path: Path):
    biased = LatentSpec(rank_gate_up=8, rank_down=8, width=96, bias=True)
    checkpoint = factored(tmp_path, SPECS | {1: biased, 3: biased})
    with pytest.raises(UnsupportedError, match=r"layers 1, 3 .*without --centre"):
        export_dense(checkpoint, tmp_path / "dense")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["factored", "source"]


def test_a_dense_checkpoint_has_nothing_to_export(tmp_path: Path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "m"), allow_factored=False)
    with pytest.raises(UsageError, match="already a dense checkpoint"):
        export_dense(checkpoint, tmp_path / "dense")


def test_an_overflow_is_reported_with_the_tensor(tmp_path: Path):
    """1000 × 1000 summed over a rank of 32 exceeds what float16 holds; each factor fits."""
    checkpoint = factored(tmp_path, SPECS, dtype="float16", scale=1000)
    with pytest.raises(NumericsError, match=r"layers\.0\..*not finite as float16.*float32"):
        export_dense(checkpoint, tmp_path / "dense")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["factored", "source"]
    export_dense(checkpoint, tmp_path / "dense", dtype=torch.float32)
    assert verify(tmp_path / "dense").ok


def test_a_killed_export_is_resumed_to_the_same_bytes(tmp_path: Path):
    checkpoint = factored(tmp_path, SPECS)
    export_dense(checkpoint, tmp_path / "expected")
    expected = digests(tmp_path / "expected")
    for number in range(5, 500, 25):
        out = tmp_path / f"out-{number}"
        killed = killed_at(number, lambda out=out: export_dense(checkpoint, out))
        export_dense(checkpoint, out, resume=True)
        assert digests(out) == expected
        if not killed:
            break
    assert number > 100
