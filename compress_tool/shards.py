"""Safetensors files written as a stream: tensors from memory beside bytes copied from a source.

Peak memory: the tensors handed in, and one copy buffer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from compress_tool.checkpoint import TORCH_DTYPES, Checkpoint
from compress_tool.durable import FileDigest, read_range, write_file
from compress_tool.headers import LENGTH_BYTES, TensorInfo
from vllm_moesvd.format import PROJECTIONS

_DTYPE_CODES: Final = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_HEADER_ALIGNMENT: Final = 8
"""The format's own rule, so that mapped payloads are aligned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deferred:
    """A tensor that is computed when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor of a shard to be: in memory, computed when it is due, or copied from a file."""

    name: str
    data: torch.Tensor | Deferred | TensorInfo

    def __post_init__(self) -> None:
        if not isinstance(self.data, TensorInfo) and self.data.dtype not in _DTYPE_CODES:
            raise ValueError(f"{self.name}: cannot store {self.data.dtype}")

    @property
    def dtype(self) -> str:
        if isinstance(self.data, TensorInfo):
            return self.data.dtype
        return _DTYPE_CODES[self.data.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.data.shape) * TORCH_DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The payload bytes."""
        if isinstance(self.data, TensorInfo):
            yield from read_range(self.data.file, self.data.start, self.data.end)
            return
        tensor = self.data if isinstance(self.data, torch.Tensor) else self.data.load()
        if tensor.dtype != self.data.dtype or tuple(tensor.shape) != tuple(self.data.shape):
            raise ValueError(
                f"{self.name}: got {tensor.dtype} {tuple(tensor.shape)}, announced was "
                f"{self.data.dtype} {tuple(self.data.shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().data


def write_shard(path: Path, parts: Sequence[Part]) -> FileDigest:
    """Write one safetensors file atomically; the same parts give the same bytes."""
    # The library's order: wide dtypes first keeps every tensor aligned.
    ordered = sorted(parts, key=lambda part: (-TORCH_DTYPES[part.dtype].itemsize, part.name))
    return write_file(path, _shard_chunks(ordered))


def copied_parts(checkpoint: Checkpoint, names: Sequence[str]) -> list[Part]:
    """Parts that copy these tensors byte for byte under the published names.

    The two fused tensors of a dense layer become one tensor per expert and projection, and the
    fused layout's router gets its published name.
    """
    renamed = {
        found: published
        for layer in checkpoint.moe_layers
        for published, found in checkpoint.router_tensors(layer).items()
    }
    fused = {
        f"{checkpoint.family.fused_prefix.format(layer=layer)}.{tensor}": layer
        for layer in checkpoint.moe_layers
        for tensor in ("gate_up_proj", "down_proj")
    }
    parts: list[Part] = []
    for name in names:
        if name in fused:
            parts += _split_fused(checkpoint, checkpoint.tensors[name], fused[name])
        else:
            parts.append(Part(name=renamed.get(name, name), data=checkpoint.tensors[name]))
    return parts


def index_json(files: Mapping[str, Sequence[TensorInfo]]) -> bytes:
    """The index file for shards given as file name -> tensors."""
    weight_map = {info.name: file for file, tensors in files.items() for info in tensors}
    metadata = {
        "total_parameters": sum(t.num_params for tensors in files.values() for t in tensors),
        "total_size": sum(t.num_bytes for tensors in files.values() for t in tensors),
    }
    value = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(value, indent=2) + "\n").encode()


def _split_fused(checkpoint: Checkpoint, info: TensorInfo, layer: int) -> list[Part]:
    """Split [E, 2F, D] or [E, D, F] into per-expert parts, as byte ranges of the same file."""
    d, f = checkpoint.shape.hidden_size, checkpoint.shape.expert_width
    is_down = info.name.endswith(".down_proj")
    step = d * f * TORCH_DTYPES[info.dtype].itemsize
    parts: list[Part] = []
    start = info.start
    for expert in range(checkpoint.shape.num_experts):
        for projection in PROJECTIONS[2:] if is_down else PROJECTIONS[:2]:
            name = checkpoint.family.expert_tensor(layer, expert, projection)
            part = TensorInfo(
                name=name,
                file=info.file,
                dtype=info.dtype,
                shape=(d, f) if is_down else (f, d),
                start=start,
                end=start + step,
            )
            parts.append(Part(name=name, data=part))
            start += step
    return parts


def _shard_chunks(parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for part in parts:
        if part.name in header:
            raise ValueError(f"{part.name} appears twice in one shard")
        end = position + part.num_bytes
        header[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.data.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    yield len(text).to_bytes(LENGTH_BYTES, "little") + text
    for part in parts:
        yield from part.chunks()
