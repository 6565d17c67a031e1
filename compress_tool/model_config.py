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
from compress_tool.model_tensors import (
    Shapes,
    attention_tensors,
    block_tensors,
    mlp_tensors,
    outer_tensors,
)
from vllm_moesvd.format import (
    CONFIG_KEY,
    FAMILIES,
    CheckpointSpec,
    Family,
    FormatError,
    LayerPattern,
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
_LATENT_SIZES: Final = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A checked config.json. `spec` is None for a dense checkpoint."""

    values: Mapping[str, Any]
    family: Family
    shape: MoEShape
    num_layers: int
    pattern: LayerPattern
    head_dim: int
    tied_embeddings: bool
    spec: CheckpointSpec | None

    def is_factored(self, layer: int) -> bool:
        return self.spec is not None and layer in self.spec.layers

    def moe_layers(self, file: Path) -> tuple[int, ...]:
        """The layers with routed experts; raises UnsupportedError if there are none.

        To be asked once the number of layers is known to be one that exists.
        """
        layers = tuple(i for i in range(self.num_layers) if self.pattern.has_experts(i))
        if not layers:
            raise UnsupportedError(f"{file}: none of the {self.num_layers} layers has experts")
        return layers

    def outer_tensors(self) -> Shapes:
        """Name and shape of the tensors outside the decoder layers."""
        return outer_tensors(self.family, self.values, tied=self.tied_embeddings)

    def attention_tensors(self, layer: int) -> Shapes:
        """Name and shape of one decoder layer's attention and norms."""
        return attention_tensors(self.family, self.values, layer, self.head_dim)

    def mlp_tensors(self, layer: int, *, fused: bool) -> Shapes:
        """Router and shared expert of an MoE layer, or the MLP of another one."""
        if self.pattern.has_experts(layer):
            return block_tensors(self.family, self.values, self.shape, layer, fused=fused)
        width = self.values["intermediate_size"]
        return mlp_tensors(f"model.layers.{layer}.mlp", width, self.shape.hidden_size)


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
    untested = family.unsupported(config)
    if untested is not None:
        raise UnsupportedError(f"{file}: {untested}")
    for key in (*_REQUIRED_SIZES, family.expert_width_key):
        _positive(config, key, file)
    try:
        _positive(config, family.num_experts_key(config), file)
        shape = family.moe_shape(config)
        pattern = family.layer_pattern(config)
        family.routing_groups(config)
        if family.shared is not None:
            family.shared.width(config)
    except FormatError as error:
        raise InputError(f"{file}: {error}") from None
    if pattern != LayerPattern():
        _positive(config, "intermediate_size", file)
    head_dim = _head_dim(config, family, file)
    _check_optional(config, family, file)
    num_layers = config["num_hidden_layers"]
    spec = _spec(config, family, shape, num_layers, file)
    for layer in () if spec is None else spec.layers:
        if not pattern.has_experts(layer):
            raise InputError(f"{file}: {CONFIG_KEY} factors layer {layer}, which has no experts")
    return ModelConfig(
        values=config,
        family=family,
        shape=shape,
        num_layers=num_layers,
        pattern=pattern,
        head_dim=head_dim,
        tied_embeddings=config.get("tie_word_embeddings", False),
        spec=spec,
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
        names = (family.architecture, family.saved_architecture, family.factored_architecture)
        if name in names:
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


def _head_dim(config: Mapping[str, Any], family: Family, file: Path) -> int:
    """Size of a query head; 0 where the family has no such thing."""
    if family.attention == "latent":
        for key in _LATENT_SIZES:
            _positive(config, key, file)
        if "q_lora_rank" not in config:
            raise InputError(f"{file}: the key q_lora_rank is missing")
        if config["q_lora_rank"] is not None:
            _positive(config, "q_lora_rank", file)
        return 0
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


def _check_optional(config: Mapping[str, Any], family: Family, file: Path) -> None:
    """Types of the keys that transformers reads and that may be absent."""
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"{file}: hidden_act is {show(config['hidden_act'])}, only 'silu' is supported"
        )
    flags = ("tie_word_embeddings", "use_cache", "output_router_logits", "norm_topk_prob")
    for key in flags:
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{file}: {key} must be true or false, found {show(config[key])}")
    for key in ("sliding_window", "max_position_embeddings"):
        # Families with a switch for the window have it off, and transformers writes 0 then.
        is_off = key == "sliding_window" and "use_sliding_window" in family.accepted
        if config.get(key) is not None and not (is_off and config[key] == 0):
            _positive(config, key, file)
    for key in ("rms_norm_eps", "rope_theta"):
        _number(config, key, file, smallest=math.ulp(0.0))
    for key in (
        "attention_dropout",
        "initializer_range",
        "router_aux_loss_coef",
        "routed_scaling_factor",
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
