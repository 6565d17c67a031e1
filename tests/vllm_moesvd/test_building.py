"""Each form inside vLLM's own model, one MoE block at a time, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.hand_made import ALL_FORMS, EXACT_LAYERS, MIXTRAL, ODD_LAYERS, hand_made
from tests.vllm_moesvd.layer_math import layer_output, softmax_routing
from vllm_moesvd import building
from vllm_moesvd.loading import read_plan

CASES = {"exact": (EXACT_LAYERS, True), "odd": (ODD_LAYERS, False)}


@pytest.mark.parametrize("kind", CASES)
def test_every_layer_equals_the_reference(kind: str, tmp_path: Path) -> None:
    layers, exact = CASES[kind]
    made = hand_made(layers, exact=exact)
    config = harness.engine_config(made.write(tmp_path / kind))
    model = harness.load_model(config)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in range(6):
        expected = layer_output(
            made, layers.get(layer), layer, x_TD, *softmax_routing(made, layer, x_TD)
        )
        actual = harness.run_moe_block(model, config, layer, x_TD)
        assert are_close(actual, expected), (layer, distance(actual, expected))
        one = harness.run_moe_block(model, config, layer, x_TD[:1])
        assert are_close(one, expected[:1]), (layer, distance(one, expected[:1]))


def test_wrong_weights_are_seen(tmp_path: Path) -> None:
    """The null test: two experts swapped on disk, in each form, change the output."""
    made = hand_made(ODD_LAYERS, exact=False)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    right = {
        layer: layer_output(made, spec, layer, x_TD, *softmax_routing(made, layer, x_TD))
        for layer, spec in ODD_LAYERS.items()
    }
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        first, second = f"{prefix}.0.w2.weight", f"{prefix}.1.w2.weight"
        made.tensors[first], made.tensors[second] = made.tensors[second], made.tensors[first]
    for layer in (3, 4, 5):
        name = f"model.layers.{layer}.block_sparse_moe.experts.moesvd.u_down"
        made.tensors[name] = made.tensors[name].flip(0).contiguous()
    config = harness.engine_config(made.write(tmp_path / "swapped"))
    model = harness.load_model(config)
    for layer, expected in right.items():
        assert not are_close(harness.run_moe_block(model, config, layer, x_TD), expected)


def test_bfloat16_checkpoints_load(tmp_path: Path) -> None:
    made = hand_made(ODD_LAYERS, exact=False)
    for name, tensor in made.tensors.items():
        made.tensors[name] = tensor.bfloat16()
    made.config["dtype"] = "bfloat16"
    config = harness.engine_config(made.write(tmp_path / "bf16"), dtype="bfloat16")
    model = harness.load_model(config)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    for layer in range(6):
        routing = softmax_routing(made, layer, x_TD)
        expected = layer_output(made, ODD_LAYERS.get(layer), layer, x_TD, *routing)
        actual = harness.run_moe_block(model, config, layer, x_TD)
        # A token whose two best experts are as good as tied may be routed elsewhere in bf16.
        agree = [
            t for t in range(40) if are_close(actual[t, None], expected[t, None], torch.bfloat16)
        ]
        assert len(agree) >= 36, (layer, distance(actual, expected))


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_embeddings_load_with_and_without_a_stored_head(
    has_head: bool, tmp_path: Path
) -> None:
    made = hand_made(ODD_LAYERS, exact=False, tie_word_embeddings=True)
    if has_head:
        made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].clone()
    model = harness.load_model(harness.engine_config(made.write(tmp_path / "tied")))
    assert torch.equal(
        model.model.embed_tokens.weight[:260], made.tensors["model.embed_tokens.weight"]
    )


def test_the_dummy_load_format_runs(tmp_path: Path) -> None:
    """Sizes can be tried without weights, as with every model of vLLM."""
    path = hand_made(ODD_LAYERS, exact=False).write(tmp_path / "odd")
    for file in path.glob("*.safetensors*"):
        file.unlink()
    config = harness.engine_config(path, load_format="dummy")
    model = harness.load_model(config)
    for layer in range(6):
        assert harness.run_moe_block(model, config, layer, torch.randn(3, 64)).isfinite().all()


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors"])
def test_load_formats_that_read_safetensors(load_format: str, tmp_path: Path) -> None:
    made = hand_made(ALL_FORMS, exact=False)
    config = harness.engine_config(made.write(tmp_path / "all"), load_format=load_format)
    model = harness.load_model(config)
    x_TD = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    for layer, spec in ALL_FORMS.items():
        expected = layer_output(made, spec, layer, x_TD, *softmax_routing(made, layer, x_TD))
        assert are_close(harness.run_moe_block(model, config, layer, x_TD), expected)


def test_nothing_is_allocated_after_loading(tmp_path: Path) -> None:
    """vLLM's sleep mode moves what was there when the model was built and loaded."""
    made = hand_made(ALL_FORMS, exact=False)
    config = harness.engine_config(made.write(tmp_path / "all"))
    model = harness.load_model(config)
    before = {name: tensor.data_ptr() for name, tensor in _tensors(model)}
    for layer in range(6):
        harness.run_moe_block(model, config, layer, torch.randn(5, 64))
    assert {name: tensor.data_ptr() for name, tensor in _tensors(model)} == before


def test_the_only_replaced_name_is_put_back(tmp_path: Path) -> None:
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.model_executor.models import mixtral

    path = hand_made(ODD_LAYERS, exact=False).write(tmp_path / "odd")
    hf_config = harness.engine_config(path).model_config.hf_config
    plan = read_plan(MIXTRAL, hf_config)
    with building.factored_layers(mixtral.MixtralForCausalLM, plan, replicate=False):
        assert mixtral.FusedMoEFactory is not FusedMoEFactory
    assert mixtral.FusedMoEFactory is FusedMoEFactory
    with (
        pytest.raises(KeyError, match="inside"),
        building.factored_layers(mixtral.MixtralForCausalLM, plan, replicate=False),
    ):
        raise KeyError("inside")
    assert mixtral.FusedMoEFactory is FusedMoEFactory


def test_a_vllm_that_builds_experts_otherwise_is_noticed(tmp_path: Path) -> None:
    path = hand_made(ODD_LAYERS, exact=False).write(tmp_path / "odd")
    plan = read_plan(MIXTRAL, harness.engine_config(path).model_config.hf_config)
    with (
        pytest.raises(RuntimeError, match="does not build its experts with FusedMoEFactory"),
        building.factored_layers(torch.nn.Module, plan, replicate=False),
    ):
        pass


def test_dense_layers_are_built_by_vllm_alone(tmp_path: Path) -> None:
    """Classes and shapes of a dense layer do not depend on its factored neighbours."""
    made = hand_made(ODD_LAYERS, exact=False)
    factored = harness.build_model(harness.engine_config(made.write(tmp_path / "factored")))
    dense = harness.build_model(harness.engine_config(made.write_dense(tmp_path / "dense")))
    blocks = [model.model.layers[0].block_sparse_moe for model in (factored, dense)]
    described = [
        {name: (type(module), dict(_shapes(module))) for name, module in block.named_modules()}
        for block in blocks
    ]
    assert described[0] == described[1]


def _shapes(module: torch.nn.Module):
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape)


def _tensors(model: torch.nn.Module):
    yield from model.named_parameters()
    yield from model.named_buffers()
