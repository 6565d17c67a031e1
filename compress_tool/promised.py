"""The checkpoint that a bare config.json promises: sizes for `plan`, and no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from compress_tool.checkpoint import TORCH_DTYPES, Checkpoint
from compress_tool.errors import InputError, UnsupportedError
from compress_tool.folder import MAX_CONFIG_BYTES, read_json_object
from compress_tool.headers import TensorInfo
from compress_tool.model_config import check_config
from vllm_moesvd.format import dense_layer_tensors, layer_tensors

MAX_TENSORS: Final = 4_000_000
"""Above any published model (Kimi-K2: 70 000); a config that promises more is a mistake."""
_STORED: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def promised_checkpoint(config_file: Path) -> Checkpoint:
    """Every tensor that `config_file` implies, in the config's dtype (bfloat16 if it says none).

    Sizes are exact; reading a tensor fails, there is none. Raises InputError and
    UnsupportedError as `open_checkpoint` does.
    """
    try:
        file = Path(config_file).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"{config_file}: no such file, expected a config.json") from None
    config = read_json_object(file.parent, file.name, MAX_CONFIG_BYTES)
    model = check_config(config, file)
    dtype_name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype_name not in _STORED:
        raise UnsupportedError(f"{file}: dtype {dtype_name!r} is not supported")
    dtype = _STORED[dtype_name]
    if model.num_layers * (3 * model.shape.num_experts + 7) > MAX_TENSORS:
        raise InputError(
            f"{file}: num_hidden_layers {model.num_layers} times "
            f"{model.family.num_experts_key(config)} {model.shape.num_experts} are more than "
            f"{MAX_TENSORS} tensors; correct them"
        )
    shapes = model.outer_tensors()
    moe_layers = model.moe_layers(file)
    for layer in range(model.num_layers):
        shapes |= model.attention_tensors(layer) | model.mlp_tensors(layer, fused=False)
        spec = None if model.spec is None else model.spec.layers.get(layer)
        if spec is not None:
            shapes |= layer_tensors(spec, model.shape, model.family, layer)
        elif layer in moe_layers:
            shapes |= dense_layer_tensors(model.shape, model.family, layer)
    return Checkpoint(
        path=file.parent,
        config=dict(config),
        family=model.family,
        shape=model.shape,
        num_layers=model.num_layers,
        moe_layers=moe_layers,
        tied_embeddings=model.tied_embeddings,
        tensors={
            name: TensorInfo(
                name=name,
                file=file,
                dtype=dtype,
                shape=shape,
                start=0,
                end=math.prod(shape) * TORCH_DTYPES[dtype].itemsize,
            )
            for name, shape in shapes.items()
        },
        spec=model.spec,
    )
