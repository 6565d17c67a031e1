"""The streamed model equals transformers' own forward, with one part of the weights in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, NumericsError, UnsupportedError, UsageError
from compress_tool.packing import folded_expert
from compress_tool.streaming import StreamedModel
from tests.checkpoints import mixtral_config, mixtral_tensors, tiny_mixtral, write_checkpoint
from vllm_moesvd.format import (
    FAMILIES,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    layer_tensors,
    spec_to_json,
)

MIXTRAL = FAMILIES[0]
FORMS: dict[str, LayerSpec] = {
    "latent": LatentSpec(rank_gate_up=24, rank_down=20, width=40),
    "latent-bias": LatentSpec(rank_gate_up=24, rank_down=20, width=96, bias=True),
    "narrow": NarrowSpec(width=40),
    "shared-v": FactoredSpec(
        rank_gate_up=16, rank_down=12, expert_slot=(0, 1, 1, 2), slot_group=(0, 1, 0)
    ),
    "svd": FactoredSpec(
        rank_gate_up=16,
        rank_down=12,
        expert_slot=(0, 1, 2, 3),
        slot_group=(0, 1, 2, 3),
        form="svd",
    ),
}


def random_ids(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed))


def streamed_logits(path: Path, ids: torch.Tensor, *, batch_size: int = 2) -> torch.Tensor:
    checkpoint = open_checkpoint(path, allow_factored=True)
    model = StreamedModel(checkpoint)
    hidden = model.embed_all(ids, batch_size)
    for layer in range(checkpoint.num_layers):
        model.run_layer(layer, hidden, batch_size)
    return model.logits(hidden)


def transformers_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def write_factored(path: Path, spec: LayerSpec, *, layer: int = 1, gain: float = 1.0) -> Path:
    """A tiny Mixtral whose `layer` has random factors of one form."""
    config = mixtral_config()
    shape = MIXTRAL.moe_shape(config)
    experts = MIXTRAL.experts_prefix.format(layer=layer)
    tensors = {
        name: tensor
        for name, tensor in mixtral_tensors(config).items()
        if not name.startswith(experts)
    }
    generator = torch.Generator().manual_seed(5)
    for name, size in layer_tensors(spec, shape, MIXTRAL, layer).items():
        tensors[name] = torch.randn(size, generator=generator) * gain / size[-1] ** 0.5
    config["architectures"] = [MIXTRAL.factored_architecture]
    config["moesvd"] = spec_to_json(CheckpointSpec(layers={layer: spec}))
    return write_checkpoint(path, config, tensors)


def write_folded(path: Path, factored: Path, *, layer: int = 1) -> Path:
    """The dense checkpoint with the same function, but for the bias of the layer."""
    checkpoint = open_checkpoint(factored, allow_factored=True)
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    for expert in range(checkpoint.shape.num_experts):
        gate, up, down = folded_expert(checkpoint, layer, expert)
        for projection, weight in (("gate", gate), ("up", up), ("down", down)):
            name = MIXTRAL.expert_tensor(layer, expert, projection)
            dense = torch.zeros_like(tensors[name])
            dense[: weight.shape[0], : weight.shape[1]] = weight
            tensors[name] = dense
    return write_checkpoint(path, config, tensors)


CONFIGS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one-expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 4},
    "sliding-window": {"sliding_window": 5},
    "bf16-stored": {"dtype": "bfloat16"},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 256,
        }
    },
}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(tmp_path, overrides):
    path = tiny_mixtral(tmp_path / "model", **overrides)
    ids = random_ids(3, 33)
    expected = transformers_logits(path, ids)
    assert expected.abs().max() > 1
    # Logits of tied embeddings go up to 80; 1.4e-5 is the largest difference seen, on two threads.
    torch.testing.assert_close(streamed_logits(path, ids), expected, rtol=0, atol=3e-5)


def test_a_wrong_expert_would_be_seen(tmp_path):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    path = write_checkpoint(tmp_path / "right", config, tensors)
    first, second = (MIXTRAL.expert_tensor(1, expert, "down") for expert in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    swapped = write_checkpoint(tmp_path / "swapped", config, tensors)
    ids = random_ids(3, 33)
    assert (streamed_logits(swapped, ids) - streamed_logits(path, ids)).abs().max() > 0.1


def test_fused_layout_gives_identical_logits(tmp_path):
    config = mixtral_config()
    tensors = mixtral_tensors(config)
    path = write_checkpoint(tmp_path / "separate", config, tensors)
    for layer in range(config["num_hidden_layers"]):
        names = {
            projection: [MIXTRAL.expert_tensor(layer, expert, projection) for expert in range(4)]
            for projection in ("gate", "up", "down")
        }
        gate, up, down = (
            torch.stack([tensors.pop(name) for name in names[projection]])
            for projection in ("gate", "up", "down")
        )
        fused = MIXTRAL.fused_prefix.format(layer=layer)
        tensors[f"{fused}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{fused}.down_proj"] = down
        router = tensors.pop(MIXTRAL.router_name.format(layer=layer))
        tensors[fused.removesuffix("experts") + "gate.weight"] = router
    fused_path = write_checkpoint(tmp_path / "fused", config, tensors)
    ids = random_ids(3, 17)
    assert torch.equal(streamed_logits(fused_path, ids), streamed_logits(path, ids))


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_a_factored_layer_equals_its_folded_experts(tmp_path, spec):
    factored = write_factored(tmp_path / "factored", spec)
    folded = write_folded(tmp_path / "folded", factored)
    ids = random_ids(2, 19)
    states = []
    for path in (factored, folded):
        checkpoint = open_checkpoint(path, allow_factored=True)
        model = StreamedModel(checkpoint)
        hidden = model.embed_all(ids, 2)
        model.run_layer(0, hidden, 2)
        states.append(model.run_layer(1, hidden, 2))
    bias = torch.zeros(64)
    if isinstance(spec, LatentSpec) and spec.bias:
        tensors = load_file(factored / "model.safetensors")
        bias = tensors["model.layers.1.block_sparse_moe.experts.moesvd.bias_down"]
        assert bias.abs().max() > 0.1
    torch.testing.assert_close(states[0], states[1] + bias, rtol=0, atol=1e-5)


def test_logits_do_not_depend_on_the_batch_size(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    ids = random_ids(7, 40)
    one = streamed_logits(path, ids, batch_size=1)
    for batch_size in (2, 3, 7, 100):
        other = streamed_logits(path, ids, batch_size=batch_size)
        assert (other - one).norm() / one.norm() < 1e-6


def test_logits_do_not_depend_on_the_number_of_threads(tmp_path):
    path = tiny_mixtral(tmp_path / "model", hidden_size=128, intermediate_size=256)
    ids = random_ids(4, 60)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = streamed_logits(path, ids)
        torch.set_num_threads(2)
        two = streamed_logits(path, ids)
    finally:
        torch.set_num_threads(before)
    assert (two - one).norm() / one.norm() < 1e-6


def test_the_observer_sees_every_token_once_and_its_routing(tmp_path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    model = StreamedModel(checkpoint)
    hidden = model.embed_all(random_ids(5, 12), 2)
    seen: list[tuple[torch.Tensor, ...]] = []
    model.run_layer(0, hidden, 2, lambda *batch: seen.append(tuple(t.clone() for t in batch)))
    x, index, gate = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert [len(batch[0]) for batch in seen] == [24, 24, 12]
    assert x.shape == (60, 64)
    router = checkpoint.read(*checkpoint.router_tensors(0).values())
    scores, expected_index = (x @ router.T).softmax(dim=-1).topk(2, dim=-1)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(gate, scores / scores.sum(dim=-1, keepdim=True))


def test_one_part_is_in_memory_at_a_time(tmp_path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    model = StreamedModel(checkpoint)

    def loaded() -> set[str]:
        return {name for name, value in model._model.state_dict().items() if not value.is_meta}

    resident = loaded()
    assert resident == {"model.norm.weight"}
    hidden = model.embed(random_ids(1, 5))
    assert loaded() - resident == {"model.embed_tokens.weight"}
    for layer in (0, 1):
        model.load_layer(layer)
        assert all(f".layers.{layer}." in name for name in loaded() - resident)
        model.run_layer(layer, hidden, 1)
    model.logits(hidden)
    assert loaded() - resident == {"lm_head.weight"}
    model.free()
    assert loaded() == resident


def test_a_token_outside_the_vocabulary_is_an_input_error(tmp_path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    with pytest.raises(InputError, match="token 260, the vocabulary has 260"):
        StreamedModel(checkpoint).embed(torch.tensor([[1, 260]]))


def test_sequences_beyond_the_positions_are_a_usage_error(tmp_path):
    path = tiny_mixtral(tmp_path / "model", max_position_embeddings=16)
    model = StreamedModel(open_checkpoint(path, allow_factored=False))
    model.embed(random_ids(1, 16))
    with pytest.raises(UsageError, match="sequences of 17 tokens"):
        model.embed(random_ids(1, 17))


def test_a_layer_that_overflows_is_a_numerics_error_that_names_it(tmp_path):
    path = write_factored(tmp_path / "model", FORMS["latent"], gain=1e20)
    checkpoint = open_checkpoint(path, allow_factored=True)
    model = StreamedModel(checkpoint)
    hidden = model.embed(random_ids(1, 5))
    model.run_layer(0, hidden, 1)
    with pytest.raises(NumericsError, match="layer 1 gives NaN or infinite"):
        model.run_layer(1, hidden, 1)


def test_a_parameter_that_no_tensor_fills_is_an_error(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    model = StreamedModel(checkpoint)
    name = "model.layers.0.self_attn.q_proj.weight"
    del checkpoint.tensors[name]
    with pytest.raises(UnsupportedError, match=f"has the parameter {name}"):
        model.load_layer(0)


def test_a_tensor_that_has_no_place_is_an_error(tmp_path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    model = StreamedModel(checkpoint)
    name = "model.layers.0.self_attn.extra.weight"
    checkpoint.tensors[name] = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(UnsupportedError, match=f"tensor {name} has no place"):
        model.load_layer(0)


def test_importing_registers_and_imports_nothing(tmp_path):
    code = (
        "import sys, compress_tool.streaming, compress_tool.evaluate, compress_tool.calibration\n"
        "assert 'transformers' not in sys.modules and 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from compress_tool.calibration import calibrate
from compress_tool.checkpoint import open_checkpoint
import torch
checkpoint = open_checkpoint(Path(sys.argv[1]), allow_factored=False)
ids = torch.zeros(4, 16, dtype=torch.int64)
calibrate(checkpoint, ids, Path(sys.argv[2]), batch_size=2, progress=lambda *a: None, resume=False)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
"""The high-water mark of this process; ru_maxrss would start at that of the process before exec."""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """One layer is 26 MB, so keeping the 12 layers between 4 and 16 would add 300 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 64}
    peaks = {}
    for num_layers in (4, 16):
        path = tiny_mixtral(
            tmp_path / f"{num_layers}", num_hidden_layers=num_layers, num_shards=4, **sizes
        )
        result = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, path, tmp_path / f"{num_layers}-state"],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[num_layers] = int(result.stdout) * 1024
    layer_bytes = sum(
        info.num_bytes
        for info in open_checkpoint(path, allow_factored=False).tensors.values()
        if info.name.startswith("model.layers.0.")
    )
    assert layer_bytes > 20e6
    assert peaks[16] - peaks[4] < layer_bytes
