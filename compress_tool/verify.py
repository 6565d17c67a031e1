"""`compress_tool verify`: everything a finished checkpoint promises, checked again from the disk.

Every check is a generator of problems, one line each; none stops the others. Memory: one chunk
of a tensor, or one folded expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, TypeVar

from compress_tool.checkpoint import Checkpoint, open_checkpoint, scan_finite
from compress_tool.durable import digest_file, read_range
from compress_tool.errors import TemporaryError, ToolError, UnsupportedError, UsageError
from compress_tool.folder import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    contained_file,
    open_folder,
    read_json_object,
)
from compress_tool.headers import TensorInfo, show
from compress_tool.manifest import MANIFEST_FILE, read_manifest, source_identity
from compress_tool.packing import folded_expert
from compress_tool.plain_check import changed_keys, changed_tensors, drop_problems, plain_layers
from compress_tool.shards import copied_parts
from compress_tool.weight_error import keeps_order, layer_weight_error
from compress_tool.writer import carried_files
from vllm_moesvd.format import CONFIG_KEY, PROJECTIONS

UNLISTED_FILES: Final = frozenset({MANIFEST_FILE, "report.html"})
"""The manifest cannot list itself, nor the report that is made after it."""
RELATIVE_TOLERANCE: Final = 1e-3
ABSOLUTE_TOLERANCE: Final = 1e-6
"""Between a recorded and a recomputed weight error: the recorded one may come from another
machine, whose matrix products round differently."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCheck:
    """One layer: its form ("dense" if not factored), recomputed and recorded weight errors."""

    index: int
    form: str
    weight_error: Mapping[str, float] | None
    recorded_weight_error: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """`problems` are one-line strings; `ok` means that there is none."""

    checked_tensors: int
    problems: tuple[str, ...]
    layers: tuple[LayerCheck, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    path: Path,
    *,
    against: Checkpoint | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyResult:
    """Re-read a checkpoint completely: hashes, headers, shapes, finite values, manifest.

    With `against`, the dense source: also that the manifest names it, that every copied tensor
    and file is equal, and that each factored layer's weight error is the recorded one.
    `progress` is called with what is checked next. Raises InputError only if there is no usable
    folder at `path`, UnsupportedError for an architecture this version does not know.
    """
    root = open_folder(path)
    if against is not None and against.spec is not None:
        raise UsageError(f"{against.path}: is compressed; --against takes the dense source")
    say = progress or _silent
    problems: list[str] = []
    manifest = _attempt(problems, lambda: read_manifest(root))
    if manifest is not None:
        say("hashes")
        problems += _file_problems(root, manifest["files"])
    checkpoint = _attempt(problems, lambda: open_checkpoint(root, allow_factored=True))
    if checkpoint is None:
        return VerifyResult(checked_tensors=0, problems=tuple(problems), layers=())
    recorded = _recorded_errors(manifest, checkpoint)
    plain = plain_layers(manifest, checkpoint)
    problems += _index_problems(checkpoint)
    if manifest is not None:
        problems += _layer_list_problems(manifest, checkpoint)
    problems += _finite_problems(checkpoint, say)
    computed: dict[int, Mapping[str, float] | None] = {}
    if against is not None:
        unlike = list(_config_problems(checkpoint, against, changed_keys(checkpoint, plain)))
        problems += unlike
        if not unlike:
            problems += _source_problems(checkpoint, against, manifest)
            replaced = changed_tensors(against, plain)
            problems += _copy_problems(checkpoint, against, replaced, say)
            for layer, entry in plain.items():
                if entry["form"] == "drop":
                    say(f"kept experts of layer {layer}")
                    problems += drop_problems(checkpoint, against, layer, entry)
            for layer in {} if checkpoint.spec is None else checkpoint.spec.layers:
                say(f"weight error of layer {layer}")
                computed[layer] = _weight_error(checkpoint, against, layer)
                problems += _error_problems(root, layer, recorded.get(layer), computed[layer])
    return VerifyResult(
        checked_tensors=len(checkpoint.tensors),
        problems=tuple(problems),
        layers=tuple(
            LayerCheck(
                index=layer,
                form=_form(checkpoint, layer, plain),
                weight_error=computed.get(layer),
                recorded_weight_error=recorded.get(layer),
            )
            for layer in range(checkpoint.num_layers)
        ),
    )


def _form(checkpoint: Checkpoint, layer: int, plain: Mapping[int, Mapping[str, Any]]) -> str:
    spec = checkpoint.layer_spec(layer)
    if spec is not None:
        return spec.form
    return str(plain[layer]["form"]) if layer in plain else "dense"


def _attempt(problems: list[str], step: Callable[[], _T]) -> _T | None:
    try:
        return step()
    except TemporaryError:
        raise
    except ToolError as error:
        # Known damage explains a strange architecture; without it, the version is the reason.
        if isinstance(error, UnsupportedError) and not problems:
            raise
        problems.append(str(error))
        return None


def _file_problems(root: Path, files: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in files.items():
        try:
            digest = digest_file(contained_file(root, name))
        except TemporaryError:
            raise
        except ToolError as error:
            yield str(error)
            continue
        if {"bytes": digest.num_bytes, "sha256": digest.sha256} != expected:
            yield f"{root / name}: differs from the manifest; the file was changed or is damaged"
    known = UNLISTED_FILES | set(files)
    for name in sorted(entry.name for entry in root.iterdir()):
        if name not in known and not name.startswith("."):
            yield f"{root}: {show(name)} is not in the manifest; remove it"


def _index_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Names were compared when the checkpoint was opened; here the sums."""
    if not (checkpoint.path / INDEX_FILE).exists():
        return
    metadata = read_json_object(checkpoint.path, INDEX_FILE, MAX_INDEX_BYTES).get("metadata")
    total = sum(info.num_bytes for info in checkpoint.tensors.values())
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        yield f"{checkpoint.path / INDEX_FILE}: total_size is not the {total} bytes of the shards"


def _layer_list_problems(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    expected = {str(layer) for layer in range(checkpoint.num_layers)}
    if set(manifest["layers"]) != expected:
        yield (
            f"{checkpoint.path / MANIFEST_FILE}: describes {len(manifest['layers'])} layers, the "
            f"model has {checkpoint.num_layers}"
        )


def _finite_problems(checkpoint: Checkpoint, say: Callable[[str], None]) -> Iterator[str]:
    for name in sorted(checkpoint.tensors):
        say(name)
        try:
            scan_finite(checkpoint, [name])
        except TemporaryError:
            raise
        except ToolError as error:
            yield str(error)


def _config_problems(
    checkpoint: Checkpoint, against: Checkpoint, changed: set[str]
) -> Iterator[str]:
    ours, theirs = dict(checkpoint.config), dict(against.config)
    for key in changed or {"architectures", CONFIG_KEY}:
        ours.pop(key, None)
        theirs.pop(key, None)
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            yield (
                f"{checkpoint.path}: config.json has {show(key)} {show(ours.get(key))}, the source "
                f"{show(theirs.get(key))}"
            )


def _source_problems(
    checkpoint: Checkpoint, against: Checkpoint, manifest: Mapping[str, Any] | None
) -> Iterator[str]:
    if manifest is not None:
        recorded = manifest["source"]
        files = recorded.get("files")
        full = isinstance(files, dict) and any(name.endswith(".safetensors") for name in files)
        identity = source_identity(against, hash_weights=full)
        if any(recorded.get(key) != value for key, value in identity.items()):
            yield f"{checkpoint.path / MANIFEST_FILE}: was not made from {against.path}"
    for name, content in carried_files(against).items():
        file = checkpoint.path / name
        if not file.is_file() or file.read_bytes() != content:
            yield f"{file}: is not the source's {name}"


def _copy_problems(
    checkpoint: Checkpoint, against: Checkpoint, replaced: set[str], say: Callable[[str], None]
) -> Iterator[str]:
    """Compare, byte for byte, every tensor that is not `replaced` or a factored layer's expert."""
    factored = {} if checkpoint.spec is None else checkpoint.spec.layers
    replaced = replaced | {name for layer in factored for name in against.expert_tensors(layer)}
    for part in copied_parts(against, sorted(set(against.tensors) - replaced)):
        say(part.name)
        ours, theirs = checkpoint.tensors.get(part.name), part.data
        assert isinstance(theirs, TensorInfo)
        if ours is None:
            yield f"{checkpoint.path}: tensor {part.name} of the source is missing"
        elif ours.dtype != theirs.dtype or not _same_bytes(ours, theirs):
            yield f"{ours.file}: tensor {part.name} is not a copy of the source's"


def _same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    chunks = (read_range(info.file, info.start, info.end) for info in (left, right))
    return all(ours == theirs for ours, theirs in zip_longest(*chunks))


def _recorded_errors(
    manifest: Mapping[str, Any] | None, checkpoint: Checkpoint
) -> dict[int, Mapping[str, float]]:
    """The usable `weight_error` entries of the manifest, by layer."""
    errors: dict[int, Mapping[str, float]] = {}
    for layer in range(checkpoint.num_layers):
        entry = {} if manifest is None else manifest["layers"].get(str(layer))
        value = entry.get("weight_error") if isinstance(entry, dict) else None
        if isinstance(value, dict) and all(
            type(value.get(projection)) in (int, float) for projection in PROJECTIONS
        ):
            errors[layer] = value
    return errors


def _weight_error(
    checkpoint: Checkpoint, against: Checkpoint, layer: int
) -> Mapping[str, float] | None:
    spec = checkpoint.layer_spec(layer)
    if spec is None or not keeps_order(spec, against.shape.expert_width):
        return None
    result = layer_weight_error(
        against, layer, lambda expert: folded_expert(checkpoint, layer, expert)
    )
    return None if result is None else {str(key): value for key, value in result.items()}


def _error_problems(
    root: Path,
    layer: int,
    recorded: Mapping[str, float] | None,
    computed: Mapping[str, float] | None,
) -> Iterable[str]:
    if computed is None:
        return
    if recorded is None:
        yield f"{root / MANIFEST_FILE}: layer {layer} has no usable weight_error"
        return
    for projection in PROJECTIONS:
        found, expected = computed[projection], recorded[projection]
        if not math.isclose(
            found, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
        ):
            yield (
                f"{root}: layer {layer} {projection}: relative weight error is {found:.6g}, the "
                f"manifest says {expected:.6g}"
            )


def _silent(_: str) -> None:
    return None
