"""The MoE families: where an architecture keeps its experts, and the sizes of a routed block.

Part of the format (`format.py` hands these names on); it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from vllm_moesvd.moe_block import (
    FormatError,
    LayerPattern,
    MoEShape,
    Projection,
    RoutingGroups,
    SharedExpert,
    positive_int,
    show,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Where one architecture keeps its experts, in the checkpoint and in config.json.

    `experts_prefix` and `router_name` take `{layer}`. `*_name` are the projections' module names
    inside one expert. `*_key` are config.json keys; transformers writes some under two names,
    hence `num_experts_keys`. `fused_prefix` is the prefix of the layout with one `gate_up_proj`
    [E, 2F, D] and one `down_proj` [E, D, F] tensor for all experts; it is also transformers' name
    of the experts module.
    """

    name: str
    model_type: str
    architecture: str
    experts_prefix: str = "model.layers.{layer}.mlp.experts"
    fused_prefix: str = "model.layers.{layer}.mlp.experts"
    router_name: str = "model.layers.{layer}.mlp.gate.weight"
    router_bias_name: str | None = None
    """A tensor [E] added to the scores when experts are chosen, and to nothing else."""
    gate_name: str = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    num_experts_keys: tuple[str, ...] = ("num_experts",)
    expert_width_key: str = "moe_intermediate_size"
    top_k_key: str = "num_experts_per_tok"
    shared: SharedExpert | None = None
    sparse_step_key: str | None = None
    """Of every so many layers only the last has experts."""
    dense_layers_key: str | None = None
    """A list of layers that have none."""
    first_dense_key: str | None = None
    """How many layers at the beginning have none."""
    attention: Literal["grouped", "latent"] = "grouped"
    """`grouped`: q, k, v and o; `latent`: DeepSeek's multi-head latent attention."""
    has_qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys: over each head, or over all heads together."""
    free_head_dim: bool = True
    """Whether `head_dim` may be other than the hidden size over the number of heads."""
    group_methods: tuple[str, ...] = ()
    """Values of the key `topk_method` with which routing is limited to groups of experts."""
    group_score_size: int = 1
    """Experts of a group whose scores sum to the group's."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """What transformers does if a key is absent or null, where vLLM would do something else."""
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The values that this project has been tested with, by config key; None means absent."""

    @property
    def factored_architecture(self) -> str:
        """The `architectures` entry of a factored checkpoint of this family."""
        return self.architecture.replace("ForCausalLM", "MoESVDForCausalLM")

    def projection_name(self, projection: Projection) -> str:
        """Module name of a projection inside one expert, e.g. `w1`."""
        return {"gate": self.gate_name, "up": self.up_name, "down": self.down_name}[projection]

    def expert_tensor(self, layer: int, expert: int, projection: Projection) -> str:
        """Full checkpoint name of one expert's projection."""
        prefix = self.experts_prefix.format(layer=layer)
        return f"{prefix}.{expert}.{self.projection_name(projection)}.weight"

    def block_prefix(self, layer: int) -> str:
        """What the published names of router and shared expert begin with, dot included."""
        return self.experts_prefix.format(layer=layer).removesuffix("experts")

    def fused_name(self, layer: int, name: str) -> str:
        """A published name as the fused layout, and transformers' module, has it.

        Example: `….block_sparse_moe.gate.weight` is `….mlp.gate.weight`.
        """
        published = self.block_prefix(layer)
        if not name.startswith(published):
            return name
        fused = self.fused_prefix.format(layer=layer).removesuffix("experts")
        return fused + name.removeprefix(published)

    def num_experts_key(self, config: Mapping[str, Any]) -> str:
        """The key under which this config.json has the number of experts."""
        present = [key for key in self.num_experts_keys if config.get(key) is not None]
        if len({repr(config[key]) for key in present}) > 1:
            raise FormatError(f"config.json: {' and '.join(present)} are not the same number")
        return present[0] if present else self.num_experts_keys[0]

    def with_num_experts(self, config: Mapping[str, Any], count: int) -> dict[str, int]:
        """The entries of this config.json that say how many experts there are, with `count`."""
        present = [key for key in self.num_experts_keys if config.get(key) is not None]
        return dict.fromkeys(present, count)

    def moe_shape(self, config: Mapping[str, Any]) -> MoEShape:
        """Read the block sizes from a config.json; raises FormatError naming the key."""
        values = {}
        num_experts_key = self.num_experts_key(config)
        for name, key in (
            ("hidden_size", "hidden_size"),
            ("expert_width", self.expert_width_key),
            ("num_experts", num_experts_key),
            ("top_k", self.top_k_key),
        ):
            values[name] = positive_int(config, key, where="config.json")
        if values["top_k"] > values["num_experts"]:
            raise FormatError(
                f"config.json: {self.top_k_key} is {values['top_k']}, more than the "
                f"{values['num_experts']} experts of {num_experts_key}"
            )
        return MoEShape(**values)

    def layer_pattern(self, config: Mapping[str, Any]) -> LayerPattern:
        """Which decoder layers have routed experts; raises FormatError naming the key."""
        step, first = 1, 0
        if self.sparse_step_key is not None and self.sparse_step_key in config:
            step = positive_int(config, self.sparse_step_key, where="config.json")
        if self.first_dense_key is not None:
            # Required: what transformers takes when it is absent is not the same in all families.
            first = config.get(self.first_dense_key, -1)
            if type(first) is not int or first < 0:
                raise FormatError(
                    f"config.json: {self.first_dense_key} must be an integer ≥ 0, found "
                    f"{show(config.get(self.first_dense_key))}"
                )
        listed = config.get(self.dense_layers_key) if self.dense_layers_key is not None else None
        if listed is not None and (
            not isinstance(listed, list) or any(type(layer) is not int for layer in listed)
        ):
            raise FormatError(
                f"config.json: {self.dense_layers_key} must be a list of layers, found "
                f"{show(listed)}"
            )
        return LayerPattern(first=first, step=step, dense=frozenset(listed or ()))

    def routing_groups(self, config: Mapping[str, Any]) -> RoutingGroups | None:
        """The groups that limit the routing; None if every expert may be chosen."""
        if not self.group_methods:
            return None
        is_limited = self.completed(config).get("topk_method") in self.group_methods
        if not is_limited:
            config = self.completed(config)
        groups = RoutingGroups(
            count=positive_int(config, "n_group", where="config.json"),
            used=positive_int(config, "topk_group", where="config.json"),
            scored=self.group_score_size,
        )
        shape = self.moe_shape(config)
        problem = groups.problem(shape.num_experts, shape.top_k)
        if not is_limited and groups.used != groups.count:
            problem = f"topk_method {show(config.get('topk_method'))} uses all groups"
        if problem is not None:
            raise FormatError(
                f"config.json: n_group {groups.count}, topk_group {groups.used}: {problem}"
            )
        return groups if is_limited else None

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with what its absent keys imply written out."""
        absent = {key: value for key, value in self.implied.items() if config.get(key) is None}
        return dict(config) | absent

    def unsupported(self, config: Mapping[str, Any]) -> str | None:
        """What this config.json asks of the architecture that has not been tested, or None."""
        for key, values in self.accepted.items():
            found = config.get(key)
            if not any(type(found) is type(value) and found == value for value in values):
                known = " or ".join("absent" if value is None else show(value) for value in values)
                return f"{key} is {show(found)}; of {self.architecture} only {known} is supported"
        size, heads = config.get("head_dim"), config.get("num_attention_heads")
        if (
            not self.free_head_dim
            and isinstance(size, int)
            and isinstance(heads, int)
            and size * heads != config.get("hidden_size")
        ):
            return (
                f"head_dim is {size}; of {self.architecture} only hidden_size over "
                "num_attention_heads is supported"
            )
        return None

    @property
    def width_is_shared(self) -> bool:
        """Whether the experts' width is also that of other parts of the model."""
        return self.shared is not None and self.expert_width_key in self.shared.width_keys


_NO: Final = (False, None)
_QWEN_LAYERS: Final[dict[str, Any]] = {
    "sparse_step_key": "decoder_sparse_step",
    "dense_layers_key": "mlp_only_layers",
}
_DEEPSEEK: Final[dict[str, Any]] = {
    "num_experts_keys": ("n_routed_experts",),
    "shared": SharedExpert(
        name="shared_experts", width_keys=("moe_intermediate_size", "n_shared_experts")
    ),
    "first_dense_key": "first_k_dense_replace",
    "attention": "latent",
}

FAMILIES: Final[tuple[Family, ...]] = (
    Family(
        name="mixtral",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        experts_prefix="model.layers.{layer}.block_sparse_moe.experts",
        router_name="model.layers.{layer}.block_sparse_moe.gate.weight",
        gate_name="w1",
        up_name="w3",
        down_name="w2",
        num_experts_keys=("num_local_experts",),
        expert_width_key="intermediate_size",
    ),
    Family(
        name="qwen2_moe",
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        shared=SharedExpert(
            name="shared_expert",
            width_keys=("shared_expert_intermediate_size",),
            gate_name="shared_expert_gate",
        ),
        has_qkv_bias=True,
        free_head_dim=False,
        accepted={"qkv_bias": (True, None), "use_sliding_window": _NO},
        **_QWEN_LAYERS,
    ),
    Family(
        name="qwen3_moe",
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        num_experts_keys=("num_experts", "num_local_experts"),
        qk_norm="head",
        accepted={
            "attention_bias": _NO,
            "shared_expert_intermediate_size": (0, None),
            "use_sliding_window": _NO,
        },
        implied={"shared_expert_intermediate_size": 0},
        **_QWEN_LAYERS,
    ),
    Family(
        name="olmoe",
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        expert_width_key="intermediate_size",
        qk_norm="full",
        free_head_dim=False,
        accepted={
            "attention_bias": _NO,
            "clip_qkv": (None,),
            "norm_topk_prob": _NO,
            "tie_word_embeddings": _NO,
        },
    ),
    Family(
        name="deepseek_v2",
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        group_methods=("group_limited_greedy",),
        accepted={
            "attention_bias": _NO,
            "mlp_bias": _NO,
            "moe_layer_freq": (1, None),
            "moe_router_dtype": (None,),
            "norm_topk_prob": _NO,
            "scoring_func": ("softmax", None),
            "tie_word_embeddings": _NO,
            "topk_method": ("greedy", "group_limited_greedy", None),
        },
        implied={
            "moe_layer_freq": 1,
            "n_group": 1,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
        },
        **_DEEPSEEK,
    ),
    Family(
        name="deepseek_v3",
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        router_bias_name="model.layers.{layer}.mlp.gate.e_score_correction_bias",
        group_methods=("noaux_tc",),
        group_score_size=2,
        accepted={
            "attention_bias": _NO,
            "moe_layer_freq": (1, None),
            "moe_router_dtype": (None,),
            "norm_topk_prob": (True, None),
            "rope_interleave": (True, None),
            "scoring_func": ("sigmoid", None),
            "tie_word_embeddings": _NO,
            "topk_method": ("noaux_tc", None),
        },
        # transformers has no field for the last two, and drops them when it saves a model.
        implied={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        **_DEEPSEEK,
    ),
)
