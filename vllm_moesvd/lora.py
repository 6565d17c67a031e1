"""LoRA adapters on a model with factored experts: for attention only.

vLLM would add an adapter to the dense weights of every expert, which a factored layer does not
have, so adapters are limited to attention before the engine starts. vLLM loads an adapter's tensors
for other modules without a word and leaves them unused; here they get a name that vLLM refuses.
"""

from __future__ import annotations

import re
from typing import Any, Final

ATTENTION: Final = (
    "qkv_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "fused_qkv_a_proj",
)
"""Names of the linear layers of both kinds of attention, in checkpoints and in vLLM."""
_OTHER_MODULE: Final = re.compile(rf"\.(?!(?:{'|'.join(ATTENTION)})\.)(\w+)\.lora_")


def limit_to_attention(lora_config: Any) -> str | None:
    """Set vLLM's `--lora-target-modules` to attention; a line if something else is asked for."""
    asked = lora_config.target_modules
    others = [name for name in asked or () if name.rpartition(".")[2] not in ATTENTION]
    if others:
        return (
            f"moesvd: --lora-target-modules {' '.join(others)} is not supported for factored "
            f"checkpoints; adapters can be for attention only ({', '.join(ATTENTION)})"
        )
    for option in ("enable_moe_shared_loras", "enable_mixed_moe_lora_format"):
        if getattr(lora_config, option):
            return (
                f"moesvd: --{option.replace('_', '-')} is not supported for factored checkpoints; "
                "adapters can be for attention only, leave it out"
            )
    lora_config.target_modules = list(asked or ATTENTION)
    return None


def refuse_other_adapters(base: type) -> dict[str, Any]:
    """Class members with which vLLM refuses to load an adapter that is not for attention alone.

    Example: `…experts.0.w1.lora_A` becomes `…experts.0.w1_of_a_factored_model.lora_A`, which vLLM
    names as a module that the model does not have.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    renamed = WeightsMapper(orig_to_new_regex={_OTHER_MODULE: r".\1_of_a_factored_model.lora_"})
    own = getattr(base, "hf_to_vllm_mapper", None)
    return {
        "hf_to_vllm_mapper": renamed if own is None else renamed | own,
        # Without this vLLM lists the projections of every expert among what adapters may have.
        "is_3d_moe_weight": True,
    }
