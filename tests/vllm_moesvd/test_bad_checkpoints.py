"""Whatever is wrong with a checkpoint's tensors stops loading with one line that names the tensor.

Stock vLLM 0.32 loads most of these silently and serves uninitialised memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm_moesvd import harness
from tests.vllm_moesvd.hand_made import MIXTRAL, ODD_LAYERS, HandMade, hand_made
from vllm_moesvd.audit import INDEX_FILE, audit_folder
from vllm_moesvd.loading import LoadingError

DENSE, LATENT, NARROW, SHARED, TRIMMED, SVD = range(6)
Tensors = dict[str, torch.Tensor]


def expert(layer: int, name: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{name}"


def drop(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def add(name: str, *size: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        assert name not in tensors
        tensors[name] = torch.zeros(size)

    return edit


def resize(name: str, *size: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        assert tuple(tensors[name].shape) != size
        tensors[name] = torch.zeros(size)

    return edit


def drop_layer_experts(layer: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(expert(layer, ""))]:
            del tensors[name]

    return edit


def fuse_dense_experts(tensors: Tensors) -> None:
    """The layout of transformers 5 in memory, which vLLM's Mixtral cannot load."""
    gate_up = [
        torch.cat([tensors.pop(expert(DENSE, f"{e}.{w}.weight")) for w in ("w1", "w3")])
        for e in range(4)
    ]
    down = [tensors.pop(expert(DENSE, f"{e}.w2.weight")) for e in range(4)]
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.stack(down)


# Each case: what is done to the tensors, and what the line must say.
CASES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "dense expert missing": (
        drop(expert(DENSE, "2.w1.weight")),
        r"experts\.2\.w1\.weight: not found, expected shape \[96, 64\]",
    ),
    "all dense experts missing": (drop_layer_experts(DENSE), r"experts\.0\.w1\.weight and 11 more"),
    "dense expert of half width": (
        resize(expert(DENSE, "1.w1.weight"), 48, 64),
        r"experts\.1\.w1\.weight: found shape \[48, 64\], expected \[96, 64\]",
    ),
    "dense down of half width": (
        resize(expert(DENSE, "1.w2.weight"), 64, 48),
        r"found shape \[64, 48\], expected \[64, 96\]",
    ),
    "dense expert too wide": (
        resize(expert(DENSE, "3.w3.weight"), 128, 64),
        r"found shape \[128, 64\], expected \[96, 64\]",
    ),
    "dense expert transposed": (
        resize(expert(DENSE, "0.w2.weight"), 96, 64),
        r"found shape \[96, 64\], expected \[64, 96\]",
    ),
    "one expert too many": (add(expert(DENSE, "4.w1.weight"), 96, 64), "promises no such tensor"),
    "unknown projection": (add(expert(DENSE, "0.w4.weight"), 96, 64), "promises no such tensor"),
    "expert bias": (add(expert(DENSE, "0.w1.bias"), 96), "promises no such tensor"),
    "fused dense experts": (fuse_dense_experts, "promises no such tensor"),
    "factor in a dense layer": (
        add(expert(DENSE, "moesvd.v_gate_up"), 33, 64),
        r"layers\.0\..*moesvd\.v_gate_up: found with shape \[33, 64\]",
    ),
    "latent V missing": (
        drop(expert(LATENT, "moesvd.v_gate_up")),
        r"moesvd\.v_gate_up: not found, expected shape \[33, 64\]",
    ),
    "latent Q missing": (drop(expert(LATENT, "moesvd.q_down")), r"moesvd\.q_down: not found"),
    "latent bias missing": (drop(expert(LATENT, "moesvd.bias_down")), r"bias_down: not found"),
    "latent V of another rank": (
        resize(expert(LATENT, "moesvd.v_gate_up"), 32, 64),
        r"v_gate_up: found shape \[32, 64\], expected \[33, 64\]",
    ),
    "latent Q transposed": (
        resize(expert(LATENT, "moesvd.q_down"), 21, 64),
        r"q_down: found shape \[21, 64\], expected \[64, 21\]",
    ),
    "latent bias too short": (
        resize(expert(LATENT, "moesvd.bias_down"), 1),
        r"bias_down: found shape \[1\], expected \[64\]",
    ),
    "latent core missing": (
        drop(expert(LATENT, "3.w2.weight")),
        r"layers\.1\..*3\.w2\.weight: not found, expected shape \[21, 45\]",
    ),
    "latent core left dense": (
        resize(expert(LATENT, "0.w1.weight"), 96, 64),
        r"found shape \[96, 64\], expected \[45, 33\]",
    ),
    "latent core of fewer neurons": (
        resize(expert(LATENT, "0.w3.weight"), 44, 33),
        r"found shape \[44, 33\], expected \[45, 33\]",
    ),
    "all latent cores missing": (
        drop(*(expert(LATENT, f"{e}.{w}.weight") for e in range(4) for w in ("w1", "w2", "w3"))),
        "and 11 more: not found",
    ),
    "narrow expert missing": (drop(expert(NARROW, "0.w3.weight")), r"0\.w3\.weight: not found"),
    "narrow expert of full width": (
        resize(expert(NARROW, "2.w1.weight"), 96, 64),
        r"found shape \[96, 64\], expected \[37, 64\]",
    ),
    "stray V in a narrow layer": (
        add(expert(NARROW, "moesvd.v_gate_up"), 64, 64),
        "promises no such tensor",
    ),
    "shared V missing": (drop(expert(SHARED, "moesvd.v_gate")), r"v_gate: not found"),
    "shared V without its group dimension": (
        resize(expert(SHARED, "moesvd.v_up"), 19, 64),
        r"v_up: found shape \[19, 64\], expected \[2, 19, 64\]",
    ),
    "U of one slot too few": (
        resize(expert(SHARED, "moesvd.u_up"), 3, 96, 19),
        r"u_up: found shape \[3, 96, 19\], expected \[4, 96, 19\]",
    ),
    "U of another rank": (
        resize(expert(TRIMMED, "moesvd.u_down"), 3, 64, 17),
        r"u_down: found shape \[3, 64, 17\], expected \[3, 64, 23\]",
    ),
    "U of half width": (
        resize(expert(TRIMMED, "moesvd.u_gate"), 3, 48, 17),
        r"expected \[3, 96, 17\]",
    ),
    "V down of half width": (
        resize(expert(SVD, "moesvd.v_down"), 3, 13, 48),
        r"expected \[3, 13, 96\]",
    ),
    "dense expert in a factored layer": (
        add(expert(SVD, "0.w1.weight"), 96, 64),
        "promises no such tensor",
    ),
    "bias in a factored layer": (
        add(expert(SVD, "moesvd.bias_down"), 64),
        "promises no such tensor",
    ),
    "unknown factor": (add(expert(SVD, "moesvd.u_router"), 4), "promises no such tensor"),
    "q_proj missing": (
        drop("model.layers.2.self_attn.q_proj.weight"),
        r"layers\.2\.self_attn\.q_proj\.weight: not found, expected shape \[64, 64\]",
    ),
    "k_proj of half size": (
        resize("model.layers.2.self_attn.k_proj.weight", 16, 64),
        r"k_proj\.weight: found shape \[16, 64\], expected \[32, 64\]",
    ),
    "o_proj missing": (drop("model.layers.0.self_attn.o_proj.weight"), r"o_proj\.weight: not"),
    "norm missing": (drop("model.layers.3.input_layernorm.weight"), r"input_layernorm.*not found"),
    "norm too long": (resize("model.norm.weight", 65), r"found shape \[65\], expected \[64\]"),
    "router missing": (
        drop("model.layers.4.block_sparse_moe.gate.weight"),
        r"gate\.weight: not found, expected shape \[4, 64\]",
    ),
    "router of more experts": (
        resize("model.layers.4.block_sparse_moe.gate.weight", 8, 64),
        r"found shape \[8, 64\], expected \[4, 64\]",
    ),
    "embedding missing": (drop("model.embed_tokens.weight"), r"embed_tokens\.weight: not found"),
    "embedding of another vocabulary": (
        resize("model.embed_tokens.weight", 256, 64),
        r"found shape \[256, 64\], expected \[260, 64\]",
    ),
    "lm_head missing": (drop("lm_head.weight"), r"lm_head\.weight: not found"),
    "a seventh layer": (add("model.layers.6.input_layernorm.weight", 64), "promises no such"),
    "attention bias": (add("model.layers.0.self_attn.q_proj.bias", 64), "promises no such tensor"),
    "a name without a module": (add("weight", 3), "tensor weight: found with shape"),
    "an empty tensor": (
        resize(expert(LATENT, "1.w1.weight"), 0, 33),
        r"found shape \[0, 33\], expected \[45, 33\]",
    ),
    "a scalar": (resize("model.norm.weight"), r"found shape \[\], expected \[64\]"),
}


@pytest.fixture(scope="module")
def made() -> HandMade:
    return hand_made(ODD_LAYERS, exact=False)


@pytest.fixture(scope="module")
def folder(made: HandMade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("made") / "odd")


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    """Built once: `load_weights` may be called again as long as nothing was processed."""
    return harness.build_model(harness.engine_config(folder))


@pytest.mark.parametrize("case", CASES)
def test_the_load_stops_and_names_the_tensor(
    case: str, made: HandMade, model: torch.nn.Module
) -> None:
    edit, message = CASES[case]
    tensors = dict(made.tensors)
    edit(tensors)
    with pytest.raises(LoadingError, match=message) as caught:
        model.load_weights(iter(tensors.items()))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("moesvd: tensor ")


@pytest.mark.parametrize("case", CASES)
def test_the_audit_stops_too_and_names_the_file(case: str, made: HandMade, tmp_path: Path) -> None:
    edit, message = CASES[case]
    tensors = dict(made.tensors)
    edit(tensors)
    path = rewritten(made, tensors, tmp_path)
    with pytest.raises(LoadingError, match=message) as caught:
        audit_folder(str(path), MIXTRAL, hf_config(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_sound_checkpoint_loads(made: HandMade, model: torch.nn.Module, folder: Path) -> None:
    loaded = model.load_weights(iter(made.tensors.items()))
    assert {name for name, _ in model.named_parameters()} <= loaded
    audit_folder(str(folder), MIXTRAL, hf_config(folder))


def test_tensors_may_come_in_any_order(made: HandMade, model: torch.nn.Module) -> None:
    model.load_weights(reversed(made.tensors.items()))


def test_a_rotary_buffer_of_old_checkpoints_is_ignored(
    made: HandMade, model: torch.nn.Module
) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    model.load_weights(iter((made.tensors | extra).items()))


def test_a_tensor_that_comes_twice_is_refused(made: HandMade, model: torch.nn.Module) -> None:
    def twice() -> Iterator[tuple[str, torch.Tensor]]:
        yield from made.tensors.items()
        yield "model.norm.weight", made.tensors["model.norm.weight"]

    with pytest.raises(LoadingError, match=r"model\.norm\.weight: found twice, expected once"):
        model.load_weights(twice())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
@pytest.mark.parametrize("name", [expert(SHARED, "moesvd.u_gate"), "lm_head.weight"])
def test_quantised_numbers_are_not_taken_for_weights(
    name: str, dtype: torch.dtype, made: HandMade, model: torch.nn.Module
) -> None:
    tensors = dict(made.tensors)
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(LoadingError, match=f"{name}: found {dtype}, expected bfloat16"):
        model.load_weights(iter(tensors.items()))


def test_files_that_are_not_sound_are_named(made: HandMade, tmp_path: Path) -> None:
    path = made.write(tmp_path / "cut")
    shard = path / "model-00002-of-00002.safetensors"
    config = hf_config(path)
    whole = shard.read_bytes()
    for broken in (whole[:-100], whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 64):
        shard.write_bytes(broken)
        with pytest.raises(LoadingError, match=f"{shard}: cannot be read as safetensors"):
            audit_folder(str(path), MIXTRAL, config)
    shard.unlink()
    with pytest.raises(LoadingError, match="names 'model-00002-of-00002"):
        audit_folder(str(path), MIXTRAL, config)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "model.bin"}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {}}',
        "{}",
        "[]",
        "not json",
        "",
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(
    index: str, made: HandMade, tmp_path: Path
) -> None:
    path = made.write(tmp_path / "odd")
    (path / INDEX_FILE).write_text(index)
    with pytest.raises(LoadingError, match="moesvd: ") as caught:
        audit_folder(str(path), MIXTRAL, hf_config(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_without_safetensors_is_refused(made: HandMade, tmp_path: Path) -> None:
    """vLLM itself would go on to unpickle this file."""
    path = made.write(tmp_path / "pickled")
    config = hf_config(path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(LoadingError, match=r"holds no \.safetensors file"):
        audit_folder(str(path), MIXTRAL, config)


def test_the_configuration_is_where_the_audit_happens(made: HandMade, tmp_path: Path) -> None:
    """`vllm serve` stops before it starts an engine."""
    path = made.write(tmp_path / "odd")
    shard = path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        harness.engine_config(path)


def hf_config(path: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def rewritten(made: HandMade, tensors: Tensors, path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(made.config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
