"""The Fisher base of D2-MoE: a backward pass through the model with one layer in memory.

    base = Σ_j f_j F_j ⊙ W_j / Σ_j f_j F_j

F_j is the mean over sequences of the squared gradient of the language-modelling loss, element by
element, f_j the routing frequency of expert j. The paper's text names the Fisher matrix; the
element-wise product with the frequency is what the authors' published code computes. (That code
shifts the labels twice and so scores the token after the next; here it is the next one.) Elements
in which no sequence has a gradient take the frequency-weighted mean.

Both sums are linear in F, so they are kept in place of a matrix per expert. Forward, the hidden
states entering each layer go to disk; backward, each layer is run again from its states and hands
the gradient of its input to the layer below. In the calibration's folder:

    fisher-states-00003.bin     hidden states [N, S, D] entering layer 3, raw
    fisher-gradient-00003.bin   gradient of the loss by them; only the last
    fisher-00003.safetensors    the result: base_gate, base_up [F, D], base_down [D, F], fp32

A killed pass goes on at the first layer that is not done and writes the same bytes. Memory: one
decoder layer, twice a base in fp64, one sequence's activations, and the states of the sequences.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from compress_tool.calibration import ProgressCallback
from compress_tool.calibration_state import byte_chunks, statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.durable import write_file
from compress_tool.errors import InputError, NumericsError, ResourceError
from compress_tool.factorize.problem import ExpertWeights
from compress_tool.layer_stats import LayerStatistics
from compress_tool.side_by_side import steady_sums
from compress_tool.sizing import FISHER_SEQUENCES, fisher_bytes
from compress_tool.streaming import StreamedModel

BASE_NAMES: Final = ("base_gate", "base_up", "base_down")


def fisher_file(directory: Path, layer: int) -> Path:
    """Where the Fisher base of a layer is, once it is known."""
    return directory / f"fisher-{layer:05}.safetensors"


def fisher_base(directory: Path, layer: int) -> ExpertWeights:
    """Gate, up [F, D] and down [D, F] of a layer's base, fp32; `measure_fisher` wrote them."""
    file = fisher_file(directory, layer)
    try:
        tensors = load_file(file)
        gate_FD, up_FD, down_DF = (tensors[name] for name in BASE_NAMES)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{file}: not the Fisher base of a layer ({error}); delete it and use --resume"
        ) from error
    return gate_FD, up_FD, down_DF


def measure_fisher(
    checkpoint: Checkpoint,
    ids_NS: torch.Tensor,
    directory: Path,
    progress: ProgressCallback,
    device: str | torch.device = "cpu",
) -> None:
    """Write the Fisher base of every MoE layer into the folder of a finished calibration.

    `ids_NS` are the calibration windows. Does what is missing, so a second call does nothing.
    Raises ResourceError when the disk is too small, NumericsError when a gradient is not finite.
    """
    folder = _Folder(checkpoint=checkpoint, ids_NS=_spread(ids_NS), path=directory)
    if all(fisher_file(directory, layer).exists() for layer in checkpoint.moe_layers):
        folder.forget()
        return
    with steady_sums(checkpoint.shape, str(device)):
        _both_ways(StreamedModel(checkpoint, device=device), folder, progress)


def _both_ways(model: StreamedModel, folder: _Folder, progress: ProgressCallback) -> None:
    """Forward through all layers, then backward, from wherever an earlier process stopped."""
    num_layers = folder.checkpoint.num_layers
    last = folder.last_gradient()
    if last is None:
        gradient_NSD = _head_gradient(model, folder, _forward(model, folder, progress))
        last = num_layers
        folder.write("gradient", last, gradient_NSD)
        folder.forget_state(last)
    else:
        gradient_NSD = folder.read("gradient", last)
    for layer in reversed(range(folder.checkpoint.moe_layers[0], last)):
        progress("fisher", 2 * num_layers - layer, 2 * num_layers, f"backward, layer {layer}")
        gradient_NSD = _backward(model, folder, layer, gradient_NSD)
        folder.write("gradient", layer, gradient_NSD)
        folder.forget_state(layer)
    folder.forget()
    progress("fisher", 2 * num_layers, 2 * num_layers, "")


def _forward(model: StreamedModel, folder: _Folder, progress: ProgressCallback) -> torch.Tensor:
    """Run all sequences, keeping what enters each layer; returns what leaves the last one.

    One sequence at a time, as the backward pass does it: a layer that is run again then gives the
    same numbers, and no token is routed elsewhere by a last bit.
    """
    num_layers = folder.checkpoint.num_layers
    first = folder.last_state()
    if first is None:
        folder.check_space()
        first, hidden_NSD = 0, model.embed_all(folder.ids_NS, 1)
        folder.write("states", 0, hidden_NSD)
    else:
        hidden_NSD = folder.read("states", first)
    for layer in range(first, num_layers):
        progress("fisher", layer, 2 * num_layers, f"forward, layer {layer}")
        model.run_sequences(layer, hidden_NSD, len(hidden_NSD))
        folder.write("states", layer + 1, hidden_NSD)
    return hidden_NSD


def _head_gradient(model: StreamedModel, folder: _Folder, hidden_NSD: torch.Tensor) -> torch.Tensor:
    """Gradient of each sequence's mean loss by the states that left the last layer."""
    gradient_NSD = torch.empty_like(hidden_NSD)
    for sequence, ids_S in enumerate(folder.ids_NS):
        with torch.enable_grad():
            hidden = hidden_NSD[sequence, None].clone().requires_grad_()
            logits_SV = model.call_head(hidden)[0, :-1].float()
            target_S = ids_S[1:].to(logits_SV.device)
            loss = torch.nn.functional.cross_entropy(logits_SV, target_S)
            gradient_NSD[sequence] = torch.autograd.grad(loss, hidden)[0][0]
    return gradient_NSD


def _backward(
    model: StreamedModel, folder: _Folder, layer: int, gradient_NSD: torch.Tensor
) -> torch.Tensor:
    """Write a layer's base and return the gradient by what entered the layer."""
    states_NSD = folder.read("states", layer)
    entering_NSD = torch.empty_like(gradient_NSD)
    model.load_layer(layer)
    is_moe = layer in folder.checkpoint.moe_layers
    experts = model.experts_of(layer) if is_moe else None
    base = None if experts is None else _Base.empty(experts, folder.frequency(layer))
    with _leaves(experts) as leaves:
        for sequence in range(len(states_NSD)):
            with torch.enable_grad():
                hidden = states_NSD[sequence, None].clone().requires_grad_()
                output = model.call_layer(layer, hidden)
                gradients = torch.autograd.grad(
                    output,
                    [hidden, *leaves],
                    gradient_NSD[sequence, None].to(output),
                    allow_unused=True,
                )
            entering_NSD[sequence] = gradients[0][0]
            if base is not None:
                base.add(leaves, gradients[1:])
    if not bool(entering_NSD.isfinite().all()):
        raise NumericsError(
            f"{folder.checkpoint.path}: the gradient of the loss by layer {layer} has NaN or "
            "infinite values; use another --base"
        )
    if base is not None:
        folder.write_base(layer, base.weights())
    return entering_NSD


@contextmanager
def _leaves(experts: Any | None) -> Iterator[list[torch.Tensor]]:
    """Each expert's weights as tensors that take gradients: all gate_up, then all down.

    Indexing one stacked parameter would give every expert a gradient of the size of the stack.
    """
    if experts is None:
        yield []
        return
    names = ("gate_up_proj", "down_proj")
    parts = {
        name: [part.detach().requires_grad_() for part in getattr(experts, name)] for name in names
    }
    # An instance attribute hides the module's parameter of the same name, and is removed again.
    experts.__dict__.update(parts)
    try:
        yield [part for name in names for part in parts[name]]
    finally:
        for name in names:
            del experts.__dict__[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """Σ f F ⊙ W, Σ f F and Σ f W of one layer, for gate_up [2F, D] and down [D, F]; fp64."""

    frequency_E: torch.Tensor
    weighted: tuple[torch.Tensor, torch.Tensor]
    total: tuple[torch.Tensor, torch.Tensor]
    mean: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def empty(cls, experts: Any, frequency_E: torch.Tensor) -> _Base:
        stacks = experts.gate_up_proj, experts.down_proj
        means = [torch.zeros_like(stack[0], dtype=torch.float64) for stack in stacks]
        for mean, stack in zip(means, stacks, strict=True):
            for share, weight in zip(frequency_E.tolist(), stack, strict=True):
                mean.add_(weight, alpha=share)
        first, second = means
        return cls(
            frequency_E=frequency_E,
            weighted=(torch.zeros_like(first), torch.zeros_like(second)),
            total=(torch.zeros_like(first), torch.zeros_like(second)),
            mean=(first, second),
        )

    def add(self, leaves: list[torch.Tensor], gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Add one sequence: its squared gradients; None for an expert it did not reach."""
        num_experts = len(self.frequency_E)
        for index, (weight, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            if gradient is None:
                continue
            kind, expert = divmod(index, num_experts)
            share = self.frequency_E[expert].item()
            square = gradient.double().square_()
            self.total[kind].add_(square, alpha=share)
            self.weighted[kind].addcmul_(square, weight.detach().double(), value=share)

    def weights(self) -> ExpertWeights:
        """Gate, up and down of the base, fp32, on the CPU."""
        gate_up, down = (
            torch.where(total > 0, weighted / total, mean).float().cpu()
            for weighted, total, mean in zip(self.weighted, self.total, self.mean, strict=True)
        )
        width = down.shape[1]
        return gate_up[:width].clone(), gate_up[width:].clone(), down


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folder:
    """The files of one pass: these sequences, in the folder of their calibration."""

    checkpoint: Checkpoint
    ids_NS: torch.Tensor
    path: Path

    def frequency(self, layer: int) -> torch.Tensor:
        """Share of the routed rows of each expert over the whole calibration, fp64 [E]."""
        counts_E = LayerStatistics.load(statistics_file(self.path, layer)).counts_E.double()
        return counts_E / counts_E.sum()

    def write_base(self, layer: int, weights: ExpertWeights) -> None:
        tensors = dict(zip(BASE_NAMES, weights, strict=True))
        write_file(fisher_file(self.path, layer), [save(tensors)])

    def write(self, kind: str, layer: int, tensor_NSD: torch.Tensor) -> None:
        write_file(self._file(kind, layer), byte_chunks(tensor_NSD))

    def read(self, kind: str, layer: int) -> torch.Tensor:
        file = self._file(kind, layer)
        shape = (*self.ids_NS.shape, self.checkpoint.shape.hidden_size)
        data = np.fromfile(file, dtype=np.float32) if file.exists() else np.empty(0)
        if data.size != int(np.prod(shape)):
            raise InputError(
                f"{file}: missing or damaged, expected {list(shape)} numbers; delete the fisher-* "
                f"files in {self.path} and use --resume"
            )
        return torch.from_numpy(data).reshape(shape)

    def last_state(self) -> int | None:
        """The highest layer whose entering states are on disk."""
        return max(self._found("states"), default=None)

    def last_gradient(self) -> int | None:
        """The lowest layer by whose input the gradient is on disk; its base is too."""
        return min(self._found("gradient"), default=None)

    def forget_state(self, layer: int) -> None:
        """What is not needed once the gradient by the input of `layer` is on disk."""
        self._file("states", layer).unlink(missing_ok=True)
        self._file("gradient", layer + 1).unlink(missing_ok=True)

    def forget(self) -> None:
        """Everything but the results."""
        for kind in ("states", "gradient"):
            for layer in self._found(kind):
                self._file(kind, layer).unlink()

    def check_space(self) -> None:
        needed = fisher_bytes(self.checkpoint, *self.ids_NS.shape)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ResourceError(
                f"{self.path}: {needed / 1e9:.1f} GB needed for the backward pass of --base "
                f"fisher, {free / 1e9:.1f} GB free; free some space or use another --base"
            )

    def _found(self, kind: str) -> list[int]:
        layers = range(self.checkpoint.num_layers + 1)
        return [layer for layer in layers if self._file(kind, layer).exists()]

    def _file(self, kind: str, layer: int) -> Path:
        return self.path / f"fisher-{kind}-{layer:05}.bin"


def _spread(ids_NS: torch.Tensor) -> torch.Tensor:
    """At most FISHER_SEQUENCES of the windows, evenly spread."""
    number = min(len(ids_NS), FISHER_SEQUENCES)
    chosen = torch.linspace(0, len(ids_NS) - 1, number).round().long()
    return ids_NS[chosen]
