"""Tiny but complete Mixtral checkpoints for tests: real names, a tokenizer, random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

POCKET_MIXTRAL = Path(__file__).parent.parent / "examples" / "pocket-mixtral"


def mixtral_config(**overrides: Any) -> dict[str, Any]:
    """A config.json for a Mixtral of 2 layers, D=64, F=96, 4 experts, top-2, 260 tokens."""
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "dtype": "float32",
        "eos_token_id": 257,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "model_type": "mixtral",
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 260,
    }
    return config | overrides


def mixtral_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published Mixtral names, scaled so that activations stay O(1)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["dtype"])

    def normal(*size: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn(size, generator=generator) * gain / size[-1] ** 0.5
        return values.to(dtype)

    d, f = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], d, generator=generator).to(
            dtype
        ),
        "model.norm.weight": torch.ones(d, dtype=dtype),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], d, gain=2.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = normal(q_size, d)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = normal(kv_size, d)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = normal(kv_size, d)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(d, q_size)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(d, dtype=dtype)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(d, dtype=dtype)
        block = f"{prefix}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = normal(config["num_local_experts"], d, gain=2.0)
        for expert in range(config["num_local_experts"]):
            tensors[f"{block}.experts.{expert}.w1.weight"] = normal(f, d)
            tensors[f"{block}.experts.{expert}.w3.weight"] = normal(f, d)
            tensors[f"{block}.experts.{expert}.w2.weight"] = normal(d, f, gain=2.0)
    return tensors


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    num_shards: int = 1,
) -> Path:
    """Write a Hugging Face folder with a byte tokenizer; several shards get an index."""
    path.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    if num_shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard::num_shards]}
            save_file(part, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_byte_tokenizer(path)
    (path / "config.json").write_text(json.dumps(dict(config), indent=2))
    return path


def tiny_mixtral(path: Path, *, seed: int = 0, num_shards: int = 1, **overrides: Any) -> Path:
    """Write a complete random Mixtral checkpoint to `path` and return it."""
    config = mixtral_config(**overrides)
    return write_checkpoint(path, config, mixtral_tensors(config, seed), num_shards=num_shards)


def write_byte_tokenizer(path: Path) -> None:
    """A tokenizer with one token per byte (ids 0-255), <s> = 256, </s> = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "backend": "tokenizers",
                "tokenizer_class": "TokenizersBackend",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
