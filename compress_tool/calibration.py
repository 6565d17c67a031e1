"""Calibration: what every layer's experts see on the calibration text, one file per layer.

One decoder layer is in memory at a time and all sequences pass through it. After each layer the
hidden states go to disk before the layer counts as done, so a killed run goes on at the first
unfinished layer and writes the same bytes. Sequences are computed one by one (`run_sequences`), so
`batch_size` and the number of threads change none of them.

Memory: the hidden states (N * S * D numbers), and what `streaming` says. Disk: `calibration_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from compress_tool.calibration_state import CalibrationFolder, statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.streaming import StreamedModel

ProgressCallback = Callable[[str, int, int, str], None]
"""Called as `progress(stage, done, total, detail)`, in layers."""


def calibrate(
    checkpoint: Checkpoint,
    ids_NS: torch.Tensor,
    directory: Path,
    *,
    batch_size: int,
    progress: ProgressCallback,
    resume: bool,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, ...]:
    """Run the sequences through the model and write the statistics of each MoE layer.

    Returns the files, in layer order. With `resume` it goes on after the last layer that is done
    (or starts, if none is), without it starts afresh. Raises InputError when the directory holds
    the state of another calibration, ResourceError when the disk is too small or full,
    NumericsError when a hidden state is not finite.
    """
    folder = CalibrationFolder(checkpoint=checkpoint, ids_NS=ids_NS, path=directory, dtype=dtype)
    last = folder.last_done() if resume else None
    if last is None:
        folder.start()
    first = 0 if last is None else last + 1
    num_layers = checkpoint.num_layers
    files = tuple(statistics_file(directory, layer) for layer in checkpoint.moe_layers)
    if first == num_layers:
        progress("calibrate", num_layers, num_layers, "")
        return files
    progress("calibrate", first, num_layers, f"layer {first}")
    model = StreamedModel(checkpoint, device=device, dtype=dtype)
    hidden_NSD = model.embed_all(ids_NS, batch_size) if last is None else folder.read_hidden(last)
    for layer in range(first, num_layers):
        model.load_layer(layer)
        if layer in checkpoint.moe_layers:
            _run_observed(model, layer, hidden_NSD, batch_size, folder, progress)
        else:
            model.run_sequences(layer, hidden_NSD, batch_size)
        folder.write_hidden(layer, hidden_NSD)
        progress("calibrate", layer + 1, num_layers, "")
    return files


def _run_observed(
    model: StreamedModel,
    layer: int,
    hidden_NSD: torch.Tensor,
    batch_size: int,
    folder: CalibrationFolder,
    progress: ProgressCallback,
) -> None:
    """Run one MoE layer and write what its experts see, reporting after every sequence."""
    num_sequences, seq_len = hidden_NSD.shape[:2]
    num_layers = folder.checkpoint.num_layers
    with folder.writer(layer) as writer:

        def observe(x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> None:
            writer.add(x_TD.cpu().float(), index_TK.cpu().long(), gate_TK.cpu().float())
            done = f"layer {layer}, sequence {writer.num_written // seq_len} of {num_sequences}"
            progress("calibrate", layer, num_layers, done)

        model.run_sequences(layer, hidden_NSD, batch_size, observe)
