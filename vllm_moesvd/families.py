"""The MoE families that are supported, as data.

Part of the format (`format.py` hands these names on); it imports the standard library only.
"""

from __future__ import annotations

from typing import Any, Final

from vllm_moesvd.family import Family
from vllm_moesvd.moe_block import SharedExpert

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
        name="phimoe",
        model_type="phimoe",
        architecture="PhiMoEForCausalLM",
        saved_architecture="PhimoeForCausalLM",
        experts_prefix="model.layers.{layer}.block_sparse_moe.experts",
        router_name="model.layers.{layer}.block_sparse_moe.gate.weight",
        router_module="router",
        gate_name="w1",
        up_name="w3",
        down_name="w2",
        num_experts_keys=("num_local_experts",),
        expert_width_key="intermediate_size",
        biases=("qkv", "o", "norm", "lm_head"),
        free_head_dim=False,
        accepted={
            "attention_bias": (True,),
            "lm_head_bias": (True,),
            "num_experts_per_tok": (2,),
            "router_jitter_noise": (0.01, None),
            # vLLM has no window; the published one is as long as the positions.
            "sliding_window": (None, 131072),
            "tie_word_embeddings": _NO,
        },
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
        biases=("qkv",),
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
