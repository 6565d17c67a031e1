"""The folder in which a calibration keeps its results and what it needs to go on after a kill.

    calibration.json            what the calibration is of; another one does not continue it
    layer-00003.safetensors     LayerStatistics of layer 3
    hidden-00003.bin            all hidden states [N, S, D] that left layer 3, raw; only the last
    probes-source.json          what method auto measured on it, for factors of that dtype
    sensitivity.json            what method moe-svd measured on it, and the experts that it
    clusters.json               found to be alike, by layer and ranks
    fisher-00003.safetensors    the base that d2-moe --base fisher found for layer 3

A layer is done when its hidden states are there, and its statistics are written before them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.durable import TEMPORARY_SUFFIX, storage_errors, write_file
from compress_tool.errors import InputError, ResourceError
from compress_tool.stats_writer import StatisticsWriter

IDENTITY_FILE: Final = "calibration.json"
LOCK_FILE: Final = "lock"
WRITE_CHUNK_BYTES: Final = 8 * 2**20


def statistics_file(directory: Path, layer: int) -> Path:
    """Where the LayerStatistics of a layer are."""
    return directory / f"layer-{layer:05}.safetensors"


def calibration_bytes(checkpoint: Checkpoint, num_tokens: int, dtype: torch.dtype) -> int:
    """Disk space that a calibration needs at its peak: all statistics and two hidden states."""
    shape = checkpoint.shape
    per_token = shape.hidden_size * 4 + shape.top_k * (8 + 4)
    hidden = 2 * shape.hidden_size * dtype.itemsize
    return num_tokens * (len(checkpoint.moe_layers) * per_token + hidden)


@contextmanager
def sole_use(path: Path) -> Iterator[None]:
    """Hold the folder of a calibration: another run that shares it waits until this one is done.

    Raises ResourceError or TemporaryError, as any failing write does.
    """
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        # A file opened for writing: NFS cannot lock a folder.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(path / LOCK_FILE, flags, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationFolder:
    """The files of one calibration: this source, this text, this precision."""

    checkpoint: Checkpoint
    ids_NS: torch.Tensor
    path: Path
    dtype: torch.dtype

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on: the text, the precision and the source."""
        files = sorted({info.file for info in self.checkpoint.tensors.values()})
        config = json.dumps(self.checkpoint.config, sort_keys=True)
        ids = self.ids_NS.contiguous().numpy().tobytes()
        return {
            "sequences": list(self.ids_NS.shape),
            "ids_sha256": hashlib.sha256(ids).hexdigest(),
            "dtype": str(self.dtype),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "weights": {
                file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files
            },
        }

    def start(self) -> None:
        """Remove what an earlier calibration left, check the disk, and say what this one is."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign_files()
        derived = "probes-*.json", "sensitivity.json", "clusters.json", "fisher-*"
        for pattern in ("layer-*.safetensors", "hidden-*.bin", *derived, IDENTITY_FILE):
            for suffix in ("", TEMPORARY_SUFFIX):
                for file in self.path.glob(pattern + suffix):
                    with storage_errors(file):
                        file.unlink()
        needed = calibration_bytes(self.checkpoint, self.ids_NS.numel(), self.dtype)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ResourceError(
                f"{self.path}: {needed / 1e9:.1f} GB needed for the calibration of "
                f"{self.ids_NS.numel()} tokens, {free / 1e9:.1f} GB free; free some space or use "
                "fewer --samples"
            )
        text = json.dumps(self._identity(), indent=2) + "\n"
        write_file(self.path / IDENTITY_FILE, [text.encode()])

    def _refuse_foreign_files(self) -> None:
        """A folder without a calibration's identity must be empty: nothing of others is deleted."""
        if (self.path / IDENTITY_FILE).exists():
            return
        for file in sorted(self.path.iterdir()):
            if file.name != LOCK_FILE and not file.name.endswith(TEMPORARY_SUFFIX):
                raise InputError(
                    f"{self.path}: holds {file.name} and no {IDENTITY_FILE}, so it is not the "
                    "folder of a calibration; give an empty or a new one"
                )

    def last_done(self) -> int | None:
        """The last layer of this very calibration whose hidden states are on disk, or None.

        None too when a statistics file up to it is gone: then only a fresh start can help.
        """
        file = self.path / IDENTITY_FILE
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}: cannot be read ({error}); delete {self.path} and calibrate again"
            ) from error
        identity = self._identity()
        if found != identity:
            keys = sorted(set(identity) | set(found)) if isinstance(found, dict) else []
            changed = [key for key in keys if found.get(key) != identity.get(key)]
            raise InputError(
                f"{file}: was written for another calibration ({', '.join(changed) or 'all'} "
                "changed); a copied checkpoint counts as changed, by its file times: run with the "
                f"old settings, or delete {self.path} to calibrate again"
            )
        for layer in reversed(range(self.checkpoint.num_layers)):
            if self._hidden_file(layer).exists():
                before = [index for index in self.checkpoint.moe_layers if index <= layer]
                complete = all(statistics_file(self.path, index).exists() for index in before)
                return layer if complete else None
        return None

    def writer(self, layer: int) -> StatisticsWriter:
        return StatisticsWriter(
            statistics_file(self.path, layer),
            num_tokens=self.ids_NS.numel(),
            hidden_size=self.checkpoint.shape.hidden_size,
            top_k=self.checkpoint.shape.top_k,
            num_experts=self.checkpoint.shape.num_experts,
        )

    def write_hidden(self, layer: int, hidden_NSD: torch.Tensor) -> None:
        """Make `layer` count as done; only then forget the layer before it."""
        write_file(self._hidden_file(layer), byte_chunks(hidden_NSD))
        for file in self.path.glob("hidden-*"):
            if file != self._hidden_file(layer):
                file.unlink()

    def read_hidden(self, layer: int) -> torch.Tensor:
        file = self._hidden_file(layer)
        shape = (*self.ids_NS.shape, self.checkpoint.shape.hidden_size)
        data = np.fromfile(file, dtype=np.uint8)
        if data.size != int(np.prod(shape)) * self.dtype.itemsize:
            raise InputError(
                f"{file}: holds {data.size} bytes, expected {list(shape)} numbers of {self.dtype}; "
                f"delete {self.path} and calibrate again"
            )
        return torch.from_numpy(data).view(self.dtype).reshape(shape)

    def _hidden_file(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:05}.bin"


def byte_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The raw bytes of a tensor, in pieces that `write_file` takes."""
    array: Any = tensor.contiguous().view(torch.uint8).numpy()
    data = memoryview(array).cast("B")
    for start in range(0, data.nbytes, WRITE_CHUNK_BYTES):
        yield data[start : start + WRITE_CHUNK_BYTES]
