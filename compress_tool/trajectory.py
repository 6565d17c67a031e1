"""Sequential calibration: what the compressed prefix makes of the text, beside the dense model.

Each layer is solved on the inputs that the compressed layers before it produce. Its target is the
output that brings the residual stream back to the dense model's: its own dense output on those
inputs, plus how far the prefix has drifted. On pocket-mixtral at 40 % this takes a fifth of the
remaining log perplexity away (docs/log.md).

Memory: two sets of hidden states and one decoder layer. Disk: two sets for each of two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress_tool.calibration_state import byte_chunks
from compress_tool.checkpoint import Checkpoint
from compress_tool.durable import write_file
from compress_tool.layer_stats import LayerStatistics
from compress_tool.probe import mean_kl, observed_layer
from compress_tool.streaming import StreamedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTask:
    """What a layer sees behind the compressed prefix, and how far that prefix has drifted.

    `drift_TD` is the dense model's hidden state minus ours, both after this layer, if this layer
    stays dense; zero while nothing is compressed.
    """

    statistics: LayerStatistics
    drift_TD: torch.Tensor


class Trajectory:
    """Owns the two sets of hidden states, in memory for one layer and on disk between layers.

    For each layer in turn: `task`, then `commit`, then (once the layer itself is on disk) `forget`.
    A new process continues behind the last committed layer.
    """

    def __init__(
        self, checkpoint: Checkpoint, ids_NS: torch.Tensor, path: Path, batch_size: int, device: str
    ) -> None:
        self._checkpoint = checkpoint
        self._ids_NS = ids_NS
        self._path = path
        self._batch_size = batch_size
        self._model = StreamedModel(checkpoint, device=device)
        self._entered: int | None = None
        self._dense_NSD = self._ours_NSD = torch.empty(0)
        path.mkdir(parents=True, exist_ok=True)

    def task(self, layer: int) -> LayerTask:
        """Run both models through the dense `layer`; the compressed prefix ends before it."""
        self._enter(layer)
        sizes = self._batch_size, self._checkpoint.shape
        self._model.run_sequences(layer, self._dense_NSD, self._batch_size)
        statistics = observed_layer(self._model, layer, self._ours_NSD, *sizes)
        self._model.free()
        drift_TD = (self._dense_NSD - self._ours_NSD).flatten(0, 1)
        return LayerTask(statistics=statistics, drift_TD=drift_TD)

    def run_dense(self, layer: int) -> None:
        """The layer stays as it is: run both models through it."""
        self._enter(layer)
        for hidden_NSD in (self._dense_NSD, self._ours_NSD):
            self._model.run_sequences(layer, hidden_NSD, self._batch_size)
        self._model.free()

    def commit(self, layer: int, change_TD: torch.Tensor | None) -> None:
        """Add what compressing the layer changed in its output; keep the states that leave it."""
        if change_TD is not None:
            self._ours_NSD += change_TD.view_as(self._ours_NSD)
        write_file(self._file("dense", layer), byte_chunks(self._dense_NSD))
        write_file(self._file("ours", layer), byte_chunks(self._ours_NSD))
        self._entered = layer + 1

    def forget(self, layer: int) -> None:
        """Drop the files of earlier layers than `layer`, which is on disk itself."""
        keep = {self._file(name, layer) for name in ("dense", "ours")}
        for file in self._path.iterdir():
            if file not in keep:
                file.unlink()

    def final_kl(self, sequences: Sequence[int]) -> float:
        """Mean KL(dense || compressed) per token of these sequences, nats, after the last layer."""
        self._enter(self._checkpoint.num_layers)
        rows = list(sequences)
        kl = mean_kl(self._model, self._dense_NSD[rows], self._ours_NSD[rows])
        self._model.free()
        return kl

    def _enter(self, layer: int) -> None:
        if self._entered == layer:
            return
        if layer == 0:
            self._dense_NSD = self._model.embed_all(self._ids_NS, self._batch_size)
            self._ours_NSD = self._dense_NSD.clone()
        else:
            self._dense_NSD = self._read("dense", layer - 1)
            self._ours_NSD = self._read("ours", layer - 1)
        self._entered = layer

    def _read(self, name: str, layer: int) -> torch.Tensor:
        size = self._checkpoint.shape.hidden_size
        data = np.fromfile(self._file(name, layer), dtype=np.float32)
        return torch.from_numpy(data).view(*self._ids_NS.shape, size)

    def _file(self, name: str, layer: int) -> Path:
        return self._path / f"{name}-{layer:05}.bin"


def trajectory_bytes(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Disk that a Trajectory needs at its peak."""
    return 4 * num_tokens * checkpoint.shape.hidden_size * 4
