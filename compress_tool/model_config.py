"""What config.json promises: family, sizes, factored layers, and every tensor that follows.

Everything here works on the parsed JSON alone, so `plan` can use it without weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compress_tool.errors import InputError, UnsupportedError
from compress_tool.folder import refuse_remote_code
from compress_tool.headers import show
from vllm_moesvd.format import (
    CONFIG_KEY,
    FAMILIES,
    CheckpointSpec,
    Family,
    FormatError,
    MoEShape,
    parse_spec,
)

MAX_SIZE: Final = 2**31 - 1
"""No size in a config.json reaches it; larger numbers overflow the libraries behind us."""
HARMLESS_PRIVATE_KEYS: Final = frozenset({"_name_or_path", "_commit_hash"})
"""Any other key with a leading underscore has been a way to load code (CVE-2026-4372)."""
_REQUIRED_SIZES: Final = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A checked config.json. `spec` is None for a dense checkpoint."""

    values: Mapping[str, Any]
    family: Family
    shape: MoEShape
    num_layers: int
    head_dim: int
    tied_embeddings: bool
    spec: CheckpointSpec | None

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors outside the decoder layers."""
        d, vocab = self.shape.hidden_size, self.values["vocab_size"]
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab, d),
            "model.norm.weight": (d,),
        }
        if not self.tied_embeddings:
            tensors["lm_head.weight"] = (vocab, d)
        return tensors

    def attention_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of one decoder layer's attention and norms."""
        d = self.shape.hidden_size
        q_size = self.values["num_attention_heads"] * self.head_dim
        kv_size = self.values["num_key_value_heads"] * self.head_dim
        prefix = f"model.layers.{layer}"
        return {
            f"{prefix}.input_layernorm.weight": (d,),
            f"{prefix}.post_attention_layernorm.weight": (d,),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, d),
            f"{prefix}.self_attn.o_proj.weight": (d, q_size),
            f"{prefix}.self_attn.q_proj.weight": (q_size, d),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, d),
        }


def check_config(config: Mapping[str, Any], file: Path) -> ModelConfig:
    """Check a parsed config.json; `file` is for messages only.

    Raises UnsupportedError for an architecture or a precision that is not supported and
    InputError for anything that is wrong.
    """
    refuse_remote_code(file, config)
    for key in config:
        if key.startswith("_") and key not in HARMLESS_PRIVATE_KEYS:
            raise InputError(f"{file}: {show(key)} is a private key of transformers; remove it")
    family = _family(config, file)
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            raise UnsupportedError(
                f"{file}: {key} says the weights are quantised ({show(method)}); start from the "
                "BF16, F16 or F32 checkpoint"
            )
    for key in (*_REQUIRED_SIZES, family.expert_width_key, family.num_experts_key):
        _positive(config, key, file)
    try:
        shape = family.moe_shape(config)
    except FormatError as error:
        raise InputError(f"{file}: {error}") from None
    head_dim = _head_dim(config, file)
    _check_optional(config, file)
    num_layers = config["num_hidden_layers"]
    return ModelConfig(
        values=config,
        family=family,
        shape=shape,
        num_layers=num_layers,
        head_dim=head_dim,
        tied_embeddings=config.get("tie_word_embeddings", False),
        spec=_spec(config, family, shape, num_layers, file),
    )


def _family(config: Mapping[str, Any], file: Path) -> Family:
    architectures = config.get("architectures")
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or not isinstance(architectures[0], str)
    ):
        raise InputError(
            f"{file}: architectures must be a list with one name, found {show(architectures)}"
        )
    name = architectures[0]
    for family in FAMILIES:
        if name in (family.architecture, family.factored_architecture):
            if config.get("model_type") != family.model_type:
                raise InputError(
                    f"{file}: model_type is {show(config.get('model_type'))}, expected "
                    f"'{family.model_type}' for {name}"
                )
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedError(f"{file}: architecture {show(name)} is not supported; {supported} is")


def _spec(
    config: Mapping[str, Any], family: Family, shape: MoEShape, num_layers: int, file: Path
) -> CheckpointSpec | None:
    is_renamed = config["architectures"][0] == family.factored_architecture
    if is_renamed != (CONFIG_KEY in config):
        raise InputError(
            f"{file}: architectures is {config['architectures'][0]} and the key {CONFIG_KEY} is "
            f"{'absent' if is_renamed else 'present'}; a compressed checkpoint has "
            f"{family.factored_architecture} and {CONFIG_KEY}, a dense one neither"
        )
    if not is_renamed:
        return None
    try:
        return parse_spec(config[CONFIG_KEY], shape, num_layers)
    except (FormatError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"{file}: {error}") from None


def _head_dim(config: Mapping[str, Any], file: Path) -> int:
    d, heads, kv_heads = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if heads % kv_heads:
        raise InputError(
            f"{file}: num_attention_heads is {heads}, not a multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    if config.get("head_dim") is not None:
        return _positive(config, "head_dim", file)
    if d % heads:
        raise InputError(
            f"{file}: hidden_size is {d}, not a multiple of num_attention_heads {heads}, and "
            "there is no head_dim"
        )
    return int(d) // int(heads)


def _check_optional(config: Mapping[str, Any], file: Path) -> None:
    """Types of the keys that transformers reads and that may be absent."""
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"{file}: hidden_act is {show(config['hidden_act'])}, only 'silu' is supported"
        )
    for key in ("tie_word_embeddings", "use_cache", "output_router_logits"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{file}: {key} must be true or false, found {show(config[key])}")
    for key in ("sliding_window", "max_position_embeddings"):
        if config.get(key) is not None:
            _positive(config, key, file)
    for key in ("rms_norm_eps", "rope_theta"):
        _number(config, key, file, smallest=math.ulp(0.0))
    for key in (
        "attention_dropout",
        "initializer_range",
        "router_aux_loss_coef",
        "router_jitter_noise",
    ):
        _number(config, key, file, smallest=0.0)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise InputError(f"{file}: {key} must be an object, found {show(rope)}")
        for name in ("rope_theta", "factor"):
            _number(rope, name, file, smallest=math.ulp(0.0))
        for name in ("rope_type", "type"):
            if not isinstance(rope.get(name, ""), str):
                raise InputError(f"{file}: {key}.{name} must be a name, found {show(rope[name])}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        if any(item is not None and type(item) is not int for item in ids):
            raise InputError(f"{file}: {key} must be a token id, found {show(value)}")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, "bfloat16", "float16", "float32"):
            raise UnsupportedError(
                f"{file}: {key} is {show(config[key])}, supported are bfloat16, float16, float32"
            )


def _number(values: Mapping[str, Any], key: str, file: Path, *, smallest: float) -> None:
    value = values.get(key, 1.0)
    if type(value) not in (int, float) or not smallest <= value < math.inf:
        raise InputError(
            f"{file}: {key} must be a number {'> 0' if smallest else '≥ 0'}, found {show(value)}"
        )


def _positive(config: Mapping[str, Any], key: str, file: Path) -> int:
    if key not in config:
        raise InputError(f"{file}: the key {key} is missing")
    value = config[key]
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise InputError(f"{file}: {key} must be a positive integer, found {show(value)}")
    return value
