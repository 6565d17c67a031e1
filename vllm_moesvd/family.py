"""What a MoE family is: where an architecture keeps its experts, and what its config says of them.

Part of the format (`families.py` has the families); it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    saved_architecture: str | None = None
    """What transformers writes into `architectures`, if vLLM knows the model by another name."""
    experts_prefix: str = "model.layers.{layer}.mlp.experts"
    fused_prefix: str = "model.layers.{layer}.mlp.experts"
    router_name: str = "model.layers.{layer}.mlp.gate.weight"
    router_module: str = "gate"
    """The router's name in the fused layout, and transformers' name of its module."""
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
    biases: tuple[Literal["qkv", "o", "norm", "lm_head"], ...] = ()
    """What outside the experts has a bias."""
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
        return _renamed(name, self.block_prefix(layer), "gate", *self._fused_block(layer))

    def published_name(self, layer: int, name: str) -> str:
        """The inverse of `fused_name`."""
        return _renamed(name, *self._fused_block(layer), self.block_prefix(layer), "gate")

    def _fused_block(self, layer: int) -> tuple[str, str]:
        return self.fused_prefix.format(layer=layer).removesuffix("experts"), self.router_module

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


def _renamed(name: str, block: str, router: str, new_block: str, new_router: str) -> str:
    if not name.startswith(block):
        return name
    inner = name.removeprefix(block)
    if inner.startswith(f"{router}."):
        inner = new_router + inner.removeprefix(router)
    return new_block + inner
