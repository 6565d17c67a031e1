"""Fold the factors back: an ordinary dense checkpoint that any engine can load.

Memory: one folded expert at a time, beside the copy buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from compress_tool.checkpoint import TORCH_DTYPES, Checkpoint, read_slice
from compress_tool.errors import NumericsError, UnsupportedError, UsageError
from compress_tool.headers import TensorInfo
from compress_tool.manifest import source_identity
from compress_tool.packing import folded_expert
from compress_tool.shards import Deferred, Part, copied_parts
from compress_tool.writer import OUTER, OutputFolder
from vllm_moesvd.format import CONFIG_KEY, PROJECTIONS, LatentSpec, Projection

DTYPE_NAMES: Final = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


def export_dense(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the dense checkpoint that computes what the factored one computes.

    Every weight keeps the precision of its layer's factors, or all become `dtype`. A layer with
    fewer neurons gets zero neurons up to the config's width. `progress` is called with each
    finished layer. Raises UsageError for a dense checkpoint, UnsupportedError for layers with an
    output bias, which dense experts cannot hold, and NumericsError if a product overflows.
    """
    _check_exportable(checkpoint)
    source_record = source_identity(checkpoint)
    job = {
        "command": "export-dense",
        "dtype": None if dtype is None else DTYPE_NAMES[dtype],
        "source": source_record,
    }
    shards = {OUTER: _copied(checkpoint, checkpoint.outer_tensors(), dtype)}
    for layer in range(checkpoint.num_layers):
        shards[layer] = _layer_parts(checkpoint, layer, dtype)
    planned = sum(part.num_bytes for parts in shards.values() for part in parts)
    with OutputFolder(
        out, job=job, num_layers=checkpoint.num_layers, planned_bytes=planned, resume=resume
    ) as folder:
        if folder.is_finished:
            return
        for index, parts in shards.items():
            if not folder.has_layer(index):
                _save(folder, index, parts)
            if progress is not None and index != OUTER:
                progress(index)
        folder.finish(
            source=checkpoint,
            config=_dense_config(checkpoint, dtype),
            source_record=source_record,
            texts={},
        )


def _save(folder: OutputFolder, index: int, parts: list[Part]) -> None:
    try:
        folder.save_parts(index, parts, {})
    except NumericsError:
        folder.discard()  # Resuming would meet the same number.
        raise


def _check_exportable(checkpoint: Checkpoint) -> None:
    if checkpoint.spec is None:
        raise UsageError(f"{checkpoint.path}: is already a dense checkpoint; nothing to export")
    biased = [
        str(layer)
        for layer, spec in checkpoint.spec.layers.items()
        if isinstance(spec, LatentSpec) and spec.bias
    ]
    if biased:
        raise UnsupportedError(
            f"{checkpoint.path}: layers {', '.join(biased)} add a bias to the experts' output, "
            f"which a dense {checkpoint.family.architecture} cannot hold; compress again without "
            "--centre, or serve this checkpoint with vLLM"
        )


def _dense_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != CONFIG_KEY}
    config["architectures"] = [checkpoint.family.architecture]
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[dtype]
    return config


def _layer_parts(checkpoint: Checkpoint, layer: int, dtype: torch.dtype | None) -> list[Part]:
    names = checkpoint.layer_tensors(layer)
    if checkpoint.layer_spec(layer) is None:
        return _copied(checkpoint, names, dtype)
    routed = checkpoint.expert_tensors(layer)
    stored = TORCH_DTYPES[checkpoint.tensors[routed[0]].dtype]
    parts = _copied(checkpoint, [name for name in names if name not in set(routed)], dtype)
    return parts + _folded_parts(checkpoint, layer, dtype or stored)


def _copied(checkpoint: Checkpoint, names: list[str], dtype: torch.dtype | None) -> list[Part]:
    parts = copied_parts(checkpoint, names)
    return parts if dtype is None else [_converted(part, dtype) for part in parts]


def _converted(part: Part, dtype: torch.dtype) -> Part:
    info = part.data
    assert isinstance(info, TensorInfo)

    def load() -> torch.Tensor:
        return _finite(read_slice(info, 0, info.shape, dtype), part.name)

    return Part(name=part.name, data=Deferred(shape=info.shape, dtype=dtype, load=load))


def _folded_parts(checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> list[Part]:
    """The dense tensors of a factored layer. The three of one expert are written in a row, so
    keeping the last expert folded saves two thirds of the products."""
    d, f = checkpoint.shape.hidden_size, checkpoint.shape.expert_width
    last: dict[int, dict[Projection, torch.Tensor]] = {}

    def load(expert: int, projection: Projection) -> torch.Tensor:
        if expert not in last:
            last.clear()
            weights = folded_expert(checkpoint, layer, expert)
            last[expert] = dict(zip(PROJECTIONS, weights, strict=True))
        name = checkpoint.family.expert_tensor(layer, expert, projection)
        weight = _finite(last[expert][projection].to(dtype), name)
        padded = torch.zeros((d, f) if projection == "down" else (f, d), dtype=dtype)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        return padded

    def deferred(expert: int, projection: Projection) -> Deferred:
        return Deferred(
            shape=(d, f) if projection == "down" else (f, d),
            dtype=dtype,
            load=lambda: load(expert, projection),
        )

    return [
        Part(
            name=checkpoint.family.expert_tensor(layer, expert, projection),
            data=deferred(expert, projection),
        )
        for expert in range(checkpoint.shape.num_experts)
        for projection in PROJECTIONS
    ]


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericsError(
            f"{name}: is not finite as {DTYPE_NAMES[tensor.dtype]}; export as float32 instead"
        )
    return tensor
