"""A checkpoint on disk: audited once from its headers, then read one tensor at a time.

Memory: a `Checkpoint` holds headers only. `read` and `expert_weight` hold one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from compress_tool.errors import InputError, TemporaryError, UnsupportedError
from compress_tool.folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    open_folder,
    read_json_object,
    read_tensors,
    refuse_remote_code,
)
from compress_tool.headers import TensorInfo, show
from compress_tool.model_config import ModelConfig, check_config
from vllm_moesvd.format import (
    CheckpointSpec,
    FactoredSpec,
    Family,
    LayerSpec,
    MoEShape,
    Projection,
    dense_layer_tensors,
    layer_tensors,
)

TORCH_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SCAN_CHUNK_BYTES: Final = 64 * 2**20
"""Large enough to stream at disk speed, small beside one expert of a real model."""
OTHER_CONFIGS: Final = ("tokenizer_config.json", "generation_config.json")
EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An audited checkpoint: every tensor that config.json promises is there, and no other.

    `spec` is None for a dense checkpoint; otherwise `spec.layers` are the factored layers.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    shape: MoEShape
    num_layers: int
    moe_layers: tuple[int, ...]
    """Indices of the decoder layers that have routed experts."""
    tied_embeddings: bool
    tensors: dict[str, TensorInfo]
    spec: CheckpointSpec | None

    @property
    def total_params(self) -> int:
        """Parameters of the model; an lm_head tied to the embedding counts once."""
        return sum(info.num_params for info in self._counted())

    @property
    def total_bytes(self) -> int:
        """Bytes of the same tensors."""
        return sum(info.num_bytes for info in self._counted())

    @property
    def routed_params(self) -> int:
        """Parameters of the routed experts, factored or not; routers do not count."""
        return sum(
            self.tensors[name].num_params
            for layer in self.moe_layers
            for name in self.expert_tensors(layer)
        )

    def layer_spec(self, layer: int) -> LayerSpec | None:
        """The form of a factored layer; None for a dense one."""
        return None if self.spec is None else self.spec.layers.get(layer)

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of all tensors of one decoder layer, sorted."""
        prefix = f"model.layers.{layer}."
        return sorted(name for name in self.tensors if name.startswith(prefix))

    def expert_tensors(self, layer: int) -> list[str]:
        """Names of the routed experts' tensors of one decoder layer, sorted."""
        prefixes = (
            self.family.experts_prefix.format(layer=layer) + ".",
            self.family.fused_prefix.format(layer=layer) + ".",
        )
        return sorted(name for name in self.tensors if name.startswith(prefixes))

    def outer_tensors(self) -> list[str]:
        """Names of the tensors outside the decoder layers, sorted."""
        return sorted(name for name in self.tensors if not name.startswith("model.layers."))

    def router_tensors(self, layer: int) -> dict[str, str]:
        """Tensors with one row per expert, [E, D] and maybe [E]: published name → name here."""
        family = self.family
        published = [family.router_name, family.router_bias_name]
        names = [name.format(layer=layer) for name in published if name is not None]
        return {n: n if n in self.tensors else family.fused_name(layer, n) for n in names}

    def is_fused(self, layer: int) -> bool:
        """Whether the layer is dense and stores all experts in two tensors."""
        return f"{self.family.fused_prefix.format(layer=layer)}.down_proj" in self.tensors

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor from disk, converted to `dtype` if given."""
        info = self.tensors[name]
        return read_slice(info, 0, info.shape, dtype)

    def read_rows(self, name: str, index: int) -> torch.Tensor:
        """Read `tensor[index]`, one entry of the first dimension, and no other bytes."""
        info = self.tensors[name]
        shape = info.shape[1:]
        return read_slice(info, index * math.prod(shape), shape, None)

    def expert_weight(self, layer: int, expert: int, projection: Projection) -> torch.Tensor:
        """One dense expert's weight, [F, D] for gate and up, [D, F] for down.

        Reads only that expert's bytes from the fused layout. The layer must not be factored.
        """
        if not 0 <= expert < self.shape.num_experts or self.layer_spec(layer) is not None:
            raise ValueError(f"layer {layer} has no dense expert {expert}")
        if not self.is_fused(layer):
            return self.read(self.family.expert_tensor(layer, expert, projection))
        prefix = self.family.fused_prefix.format(layer=layer)
        d, f = self.shape.hidden_size, self.shape.expert_width
        if projection == "down":
            return read_slice(self.tensors[f"{prefix}.down_proj"], expert * d * f, (d, f), None)
        row = 2 * expert + (1 if projection == "up" else 0)
        return read_slice(self.tensors[f"{prefix}.gate_up_proj"], row * f * d, (f, d), None)

    def _counted(self) -> list[TensorInfo]:
        return [
            info
            for name, info in self.tensors.items()
            if not (self.tied_embeddings and name == LM_HEAD)
        ]


def open_checkpoint(path: Path, *, allow_factored: bool) -> Checkpoint:
    """Audit a checkpoint folder from its JSON files and safetensors headers alone.

    No weight is read and no transformers code runs. Raises InputError for anything broken or
    unsafe, UnsupportedError for an architecture or precision this tool does not handle.
    """
    root = open_folder(Path(path))
    config = read_json_object(root, CONFIG_FILE, MAX_CONFIG_BYTES)
    model = check_config(config, root / CONFIG_FILE)
    if model.spec is not None and not allow_factored:
        raise InputError(
            f"{root}: is already compressed; give the dense checkpoint it was made from"
        )
    for name in OTHER_CONFIGS:
        if (root / name).exists() or (root / name).is_symlink():
            refuse_remote_code(root / name, read_json_object(root, name, MAX_CONFIG_BYTES))
    tensors = read_tensors(root)
    for info in tensors.values():
        if info.dtype not in TORCH_DTYPES:
            raise UnsupportedError(
                f"{info.file}: tensor {info.name} is {info.dtype}, supported are BF16, F16 and "
                "F32; start from an unquantised checkpoint"
            )
    _account_for_every_tensor(model, tensors, root)
    moe_layers = model.moe_layers(root / CONFIG_FILE)
    return Checkpoint(
        path=root,
        config=dict(config),
        family=model.family,
        shape=model.shape,
        num_layers=model.num_layers,
        moe_layers=moe_layers,
        tied_embeddings=model.tied_embeddings,
        tensors=tensors,
        spec=model.spec,
    )


def read_slice(
    info: TensorInfo, first: int, shape: tuple[int, ...], dtype: torch.dtype | None
) -> torch.Tensor:
    """Read `shape` numbers of a tensor, starting at its number `first` in row-major order."""
    stored = TORCH_DTYPES[info.dtype]
    num_bytes = math.prod(shape) * stored.itemsize
    start = info.start + first * stored.itemsize
    if first < 0 or start + num_bytes > info.end:
        raise ValueError(f"{info.name}: slice [{first}, +{math.prod(shape)}] is out of range")
    try:
        data = np.fromfile(info.file, dtype=np.uint8, count=num_bytes, offset=start)
    except OSError as error:
        raise TemporaryError(
            f"{info.file}: tensor {info.name}: reading failed: {error.strerror}; try again"
        ) from error
    if data.size != num_bytes:
        raise InputError(
            f"{info.file}: tensor {info.name} ends after {data.size} of {num_bytes} bytes; the "
            "file changed while it was being read"
        )
    tensor = torch.from_numpy(data).view(stored).reshape(shape)
    return tensor if dtype is None else tensor.to(dtype)


def scan_finite(
    checkpoint: Checkpoint, names: Iterable[str], progress: Callable[[int], None] | None = None
) -> None:
    """Read tensors in chunks and raise InputError naming the first with a NaN or an infinity.

    `progress` is called with the number of bytes just read.
    """
    for name in names:
        info = checkpoint.tensors[name]
        step = SCAN_CHUNK_BYTES // TORCH_DTYPES[info.dtype].itemsize
        for first in range(0, info.num_params, step):
            count = min(step, info.num_params - first)
            chunk = read_slice(info, first, (count,), None)
            finite = torch.isfinite(chunk)
            if not finite.all():
                offset = first + int((~finite).nonzero()[0])
                position = tuple(int(i) for i in np.unravel_index(offset, info.shape))
                raise InputError(
                    f"{info.file}: tensor {name} holds {float(chunk[offset - first])} at "
                    f"{list(position)}; the weights are broken, download them again"
                )
            if progress is not None:
                progress(chunk.nbytes)


def _account_for_every_tensor(
    model: ModelConfig, tensors: Mapping[str, TensorInfo], root: Path
) -> None:
    """Compare layer by layer and stop at the first that is wrong.

    The work is bounded by the tensors present, whatever sizes the config claims.
    """
    remaining = dict(tensors)
    outer = model.outer_tensors()
    if model.tied_embeddings and LM_HEAD in remaining:
        outer[LM_HEAD] = outer[EMBEDDING]
    _take(remaining, outer, "outside the layers", root)
    for layer in range(model.num_layers):
        where = f"layer {layer} of {model.num_layers}"
        fused = f"{model.family.fused_prefix.format(layer=layer)}.gate_up_proj"
        is_fused = fused in remaining and not model.is_factored(layer)
        _take(remaining, model.attention_tensors(layer), where, root)
        expected = model.mlp_tensors(layer, fused=is_fused)
        if model.pattern.has_experts(layer):
            expected |= _expert_shapes(model, layer, is_fused, remaining, root)
        _take(remaining, expected, where, root)
    if remaining:
        info = next(iter(remaining.values()))
        raise InputError(
            f"{info.file}: {_first_names(remaining)} not part of a "
            f"{model.values['architectures'][0]} with {model.num_layers} layers and "
            f"{model.shape.num_experts} experts"
        )


def _expert_shapes(
    model: ModelConfig,
    layer: int,
    is_fused: bool,
    remaining: Mapping[str, TensorInfo],
    root: Path,
) -> dict[str, tuple[int, ...]]:
    """The routed experts that the config promises for one layer."""
    family, shape = model.family, model.shape
    d, f, experts = shape.hidden_size, shape.expert_width, shape.num_experts
    if is_fused:
        fused = family.fused_prefix.format(layer=layer)
        return {f"{fused}.gate_up_proj": (experts, 2 * f, d), f"{fused}.down_proj": (experts, d, f)}
    spec = None if model.spec is None else model.spec.layers.get(layer)
    if not isinstance(spec, FactoredSpec) and experts > len(remaining):
        raise InputError(
            f"{root / CONFIG_FILE}: {family.num_experts_key(model.values)} is {experts}, but for "
            f"layer {layer} and later the files hold {len(remaining)} tensors"
        )
    if spec is not None:
        return layer_tensors(spec, shape, family, layer)
    return dense_layer_tensors(shape, family, layer)


def _take(
    remaining: dict[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    root: Path,
) -> None:
    """Move the expected tensors out of `remaining`; raise on a missing one or a wrong shape."""
    missing = [name for name in expected if name not in remaining]
    if missing:
        raise InputError(
            f"{root}: {where}: {_first_names(missing)} missing; config.json and the weights "
            "disagree or the download is incomplete"
        )
    for name, size in expected.items():
        info = remaining.pop(name)
        if info.shape != size:
            raise InputError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json implies "
                f"{list(size)}"
            )


def _first_names(names: Iterable[str]) -> str:
    listed = list(names)
    rest = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    verb = "is" if len(listed) == 1 else "are"
    return f"{', '.join(show(name)[1:-1] for name in listed[:3])}{rest} {verb}"
