"""transformers' own model class for a checkpoint, without weights.

Parameters are on the meta device; buffers that no checkpoint holds (rotary frequencies) are real.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.errors import InputError, UnsupportedError
from compress_tool.experts import register_experts
from vllm_moesvd.format import CONFIG_KEY

MAX_REASON: Final = 200
"""Characters of a foreign error message that fit our one line."""


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model that the config's `model_type` names, in evaluation mode.

    Uses nothing but the parsed config: no file is opened and no code from the folder can run.
    Attention is torch's scaled dot product, experts are `compress_tool.experts.forward`. Raises
    InputError when transformers does not accept the config.
    """
    try:
        model = _build(checkpoint, dtype)
    except Exception as error:  # transformers and its validators raise anything for a bad value
        reason = " ".join(str(error).split())
        raise InputError(
            f"{checkpoint.path / 'config.json'}: transformers cannot build the model it describes "
            f"({type(error).__name__}: {reason[:MAX_REASON]}); correct that entry"
        ) from error
    _compute_buffers(model, checkpoint, device)
    return model.eval()


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dropped = (CONFIG_KEY, "architectures", "dtype", "torch_dtype")
    values = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    values |= {"output_router_logits": False, "return_dict": True, "use_cache": False}
    config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa",
            experts_implementation=register_experts(),
            trust_remote_code=False,
        )


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
