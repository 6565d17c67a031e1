"""transformers' own model class for a checkpoint, without weights.

Parameters are on the meta device; buffers that no checkpoint holds (rotary frequencies) are real.
"""

from __future__ import annotations

from typing import Any

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.errors import UnsupportedError
from compress_tool.experts import register_experts
from vllm_moesvd.format import CONFIG_KEY


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model that the config's `model_type` names, in evaluation mode.

    Uses nothing but the parsed config: no file is opened and no code from the folder can run.
    Attention is torch's scaled dot product, experts are `compress_tool.experts.forward`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dropped = (CONFIG_KEY, "architectures", "dtype", "torch_dtype")
    values = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    values |= {"output_router_logits": False, "use_cache": False}
    config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa",
            experts_implementation=register_experts(),
            trust_remote_code=False,
        )
    _compute_buffers(model, checkpoint, device)
    return model.eval()


def _compute_buffers(model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    """Fill the non-persistent buffers as transformers does after loading a checkpoint."""
    for path, module in model.named_modules():
        names = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in names:
            blank = torch.full_like(getattr(module, name), float("nan"), device=device)
            setattr(module, name, blank)
        if names:
            model._init_weights(module)
        for name in names:
            if not getattr(module, name).isfinite().all():
                raise UnsupportedError(
                    f"{checkpoint.path}: transformers does not say how to compute the buffer "
                    f"{path}.{name}; this architecture is not supported"
                )
