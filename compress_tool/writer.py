"""A checkpoint written shard by shard, resumable, and visible only when complete.

Inside `<out>.partial/` (see `partial`):

    state/        the caller's own resumable files, such as calibration statistics
    layers/       one record per finished shard: digest and manifest entry
    checkpoint/   the folder that is renamed to `<out>` at the very end

A shard counts once its record exists, and every file is replaced atomically, so a kill at any
moment loses at most the shard in work. Peak memory: the tensors of one layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.durable import TEMPORARY_SUFFIX, FileDigest, storage_errors, write_file
from compress_tool.errors import InputError, UsageError, VerificationError
from compress_tool.folder import CONFIG_FILE, INDEX_FILE, contained_file, read_json_object
from compress_tool.headers import read_header
from compress_tool.manifest import MANIFEST_FILE, manifest_json
from compress_tool.partial import PartialFolder
from compress_tool.shards import Part, copied_parts, index_json, write_shard
from vllm_moesvd.format import CONFIG_KEY, CheckpointSpec, spec_to_json

CARRIED_FILES: Final = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Copied byte for byte if present. A fixed list: no name out of a file becomes a path."""
MAX_RECORD_BYTES: Final = 64 * 2**20
OUTER: Final = -1
"""Index of the shard with the tensors outside the layers."""


class OutputFolder:
    """One output checkpoint in the making; a context manager that keeps its state on failure.

    `is_finished` is true if a resumed job had already been completed: nothing is left to do.
    `state` is a folder for the caller's own resumable files, deleted by `finish`.
    """

    def __init__(
        self,
        out: Path,
        *,
        job: Mapping[str, Any],
        num_layers: int,
        planned_bytes: int = 0,
        resume: bool = False,
    ) -> None:
        """Create or resume; see `PartialFolder` for `job` and for what is raised."""
        self._partial = PartialFolder(out, job=job, planned_bytes=planned_bytes, resume=resume)
        self.out = self._partial.out
        self.is_finished = self._partial.is_finished
        self.num_layers = num_layers
        self.state = self._partial.path / "state"
        self._layers = self._partial.path / "layers"
        self._checkpoint = self._partial.path / "checkpoint"
        if not self.is_finished:
            try:
                self._prepare()
            except BaseException:
                self._partial.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._partial.close()

    def discard(self) -> None:
        """Delete the partial state: for a run that no `--resume` could complete."""
        self._partial.discard()

    def has_layer(self, layer: int) -> bool:
        """Whether the layer's shard is complete on disk."""
        return self._record(layer) is not None

    def layer_entry(self, layer: int) -> dict[str, Any]:
        """The manifest entry that was saved with a finished layer."""
        record = self._record(layer)
        if record is None:
            raise ValueError(f"layer {layer} is not finished")
        entry: dict[str, Any] = record["entry"]
        return entry

    def save_layer_shard(
        self,
        layer: int,
        source: Checkpoint,
        tensors: Mapping[str, torch.Tensor] | None,
        entry: Mapping[str, Any],
    ) -> None:
        """Write one decoder layer: `tensors` in place of its routed experts, the rest copied.

        With None the experts are copied too. `entry` is the layer's part of the manifest.
        """
        names = source.layer_tensors(layer)
        if tensors is not None:
            replaced = set(source.expert_tensors(layer))
            names = [name for name in names if name not in replaced]
        parts = copied_parts(source, names)
        parts += [Part(name=name, data=data) for name, data in (tensors or {}).items()]
        self.save_parts(layer, parts, entry)

    def carry_over(self, source: Checkpoint) -> None:
        """Copy the tensors outside the layers; does nothing if that is done."""
        if self._record(OUTER) is None:
            self.save_parts(OUTER, copied_parts(source, source.outer_tensors()), {})

    def save_parts(self, index: int, parts: Sequence[Part], entry: Mapping[str, Any]) -> None:
        """Write the shard of one layer, or of `OUTER`, from any parts."""
        digest = write_shard(self._shard(index), parts)
        record = {
            "digest": {"num_bytes": digest.num_bytes, "sha256": digest.sha256},
            "entry": dict(entry),
        }
        text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_file(self._layers / self._record_name(index), [text.encode()])

    def finish(
        self,
        *,
        source: Checkpoint,
        config: Mapping[str, Any],
        source_record: Mapping[str, Any],
        texts: Mapping[str, bytes],
    ) -> None:
        """Write all other files, config.json last, audit the folder and rename it to `out`.

        `source_record` is what `manifest.source_identity` gave; `texts` are further files by
        name, such as recipe.yaml. Every layer must have been saved.
        """
        digests, entries = self._collect()
        headers = {name: list(read_header(self._checkpoint / name).values()) for name in digests}
        contents = {INDEX_FILE: index_json(headers)} | carried_files(source) | dict(texts)
        for name, content in contents.items():
            digests[name] = write_file(self._checkpoint / name, [content])
        config_bytes = (json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n").encode()
        digests[CONFIG_FILE] = FileDigest(
            num_bytes=len(config_bytes), sha256=hashlib.sha256(config_bytes).hexdigest()
        )
        manifest = manifest_json(
            job=self._partial.job, source=source_record, files=digests, layers=entries
        )
        write_file(self._checkpoint / MANIFEST_FILE, [manifest])
        write_file(self._checkpoint / CONFIG_FILE, [config_bytes])
        self._audit({*digests, MANIFEST_FILE})
        self._partial.publish(self._checkpoint)
        self.is_finished = True

    def _prepare(self) -> None:
        """Make the folders, and remove what a killed write left behind."""
        with storage_errors(self._partial.path):
            for folder in (self.state, self._layers, self._checkpoint):
                folder.mkdir(exist_ok=True)
            for folder in (self._layers, self._checkpoint):
                for leftover in folder.glob("*" + TEMPORARY_SUFFIX):
                    leftover.unlink()

    def _audit(self, expected: set[str]) -> None:
        stray = sorted({entry.name for entry in self._checkpoint.iterdir()} - expected)
        if stray:
            raise UsageError(
                f"{self._checkpoint / stray[0]}: does not belong to this run; remove it and use "
                "--resume"
            )
        try:
            open_checkpoint(self._checkpoint, allow_factored=True)
        except InputError as error:
            raise VerificationError(f"the output is not a valid checkpoint: {error}") from error

    def _collect(self) -> tuple[dict[str, FileDigest], dict[int, dict[str, Any]]]:
        digests: dict[str, FileDigest] = {}
        entries: dict[int, dict[str, Any]] = {}
        for index in range(OUTER, self.num_layers):
            record = self._record(index)
            if record is None:
                raise ValueError(f"{self._shard(index).name} has not been saved")
            digests[self._shard(index).name] = FileDigest(**record["digest"])
            if index != OUTER:
                entries[index] = record["entry"]
        return digests, entries

    def _record(self, index: int) -> dict[str, Any] | None:
        name = self._record_name(index)
        if not (self._layers / name).exists():
            return None
        record = read_json_object(self._layers.resolve(), name, MAX_RECORD_BYTES)
        shard = self._shard(index)
        is_whole = shard.is_file() and shard.stat().st_size == record["digest"]["num_bytes"]
        return record if is_whole else None

    def _record_name(self, index: int) -> str:
        return "outer.json" if index == OUTER else f"layer-{index:05}.json"

    def _shard(self, index: int) -> Path:
        number = index + 2
        return self._checkpoint / f"model-{number:05}-of-{self.num_layers + 1:05}.safetensors"


def factored_config(source: Checkpoint, spec: CheckpointSpec) -> dict[str, Any]:
    """The config.json of a factored checkpoint: architecture renamed, `moesvd` at the end."""
    return source.config | {
        "architectures": [source.family.factored_architecture],
        CONFIG_KEY: spec_to_json(spec),
    }


def carried_files(source: Checkpoint) -> dict[str, bytes]:
    """Contents of the source's tokenizer and licence files, by name."""
    contents: dict[str, bytes] = {}
    for name in CARRIED_FILES:
        if (source.path / name).is_symlink() or (source.path / name).exists():
            contents[name] = contained_file(source.path, name).read_bytes()
    return contents
