"""What a layer costs the model: KL of the logits with this layer alone compressed. Measured.

Every MoE layer is compressed alone to the sizes of `probe_widths` and `probe_ranks`, on some
calibration sequences, and the model is run to its end on others. The layers after it are loaded
once for all sizes: L layers load L²/2 layers from disk and run each on PROBE_TOKENS tokens
six times. The result of each layer is on disk before the next one starts.

Memory: the hidden states of the probed tokens once per size, one decoder layer, one solver.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from compress_tool.calibration import ProgressCallback
from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.durable import write_file
from compress_tool.factorize.latent import solve_latent
from compress_tool.factorize.narrow import solve_narrow
from compress_tool.factorize.problem import LayerProblem, routed_output
from compress_tool.factors import LayerFactors
from compress_tool.folder import read_json_object
from compress_tool.layer_stats import LayerStatistics
from compress_tool.side_by_side import steady_sums
from compress_tool.sizing import PROBE_TOKENS
from compress_tool.solve import activation_of, layer_problem, stored_output
from compress_tool.streaming import StreamedModel
from vllm_moesvd.format import MoEShape

MAX_STATE_BYTES: Final = 2**24

FIT_TOKENS: Final = 32768
"""Tokens a probed layer is solved on, at most: the curve needs no more."""

WIDTH_SHARES: Final = (0.75, 0.5, 0.25, 0.125)
RANK_SHARES: Final = (0.75, 0.5)

LayerProbes = Mapping[str, float]
"""KL in nats per token; keys are `narrow-<width>` and `latent-<rank>` (at full width)."""


def probe_widths(shape: MoEShape) -> tuple[int, ...]:
    """Widths probed in the narrow form, widest first, without repetition."""
    return tuple(dict.fromkeys(max(1, int(share * shape.expert_width)) for share in WIDTH_SHARES))


def probe_ranks(shape: MoEShape) -> tuple[int, ...]:
    """Ranks probed in the latent form at full width, largest first, without repetition."""
    return tuple(dict.fromkeys(max(1, int(share * shape.hidden_size)) for share in RANK_SHARES))


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSplit:
    """Numbers of the sequences that a probed layer is solved on, and of those it is judged on."""

    fitted: tuple[int, ...]
    probed: tuple[int, ...]


def split_sequences(num_sequences: int, seq_len: int) -> SequenceSplit:
    """Both parts evenly spread: sequences follow the text, whose end may be about other things.

    They are disjoint unless there is one sequence only. Example: 5 sequences of 8192 tokens give
    probed 4 and fitted 0, 1, 2, 3 (at most FIT_TOKENS).
    """
    count = max(1, min(num_sequences // 4, PROBE_TOKENS // seq_len))
    probed = tuple((i + 1) * num_sequences // count - 1 for i in range(count))
    others = [i for i in range(num_sequences) if i not in probed] or list(probed)
    kept = min(len(others), max(1, FIT_TOKENS // seq_len))
    fitted = tuple(others[i * len(others) // kept] for i in range(kept))
    return SequenceSplit(fitted=fitted, probed=probed)


def probe_file_name(recipe: Recipe) -> str:
    """The probes depend on nothing in the recipe but the text and the dtype of the factors."""
    return f"probes-{recipe.dtype}.json"


def known_probes(directory: Path, recipe: Recipe) -> dict[int, LayerProbes]:
    """The layers of this calibration that have been measured."""
    name = probe_file_name(recipe)
    if not (directory / name).exists():
        return {}
    found = read_json_object(directory, name, MAX_STATE_BYTES)
    return {int(layer): values for layer, values in found.items()}


def probe_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    ids_NS: torch.Tensor,
    directory: Path,
    progress: ProgressCallback,
    device: str,
) -> dict[int, LayerProbes]:
    """Measure every layer of `layers`; `directory` holds the statistics of the same `ids_NS`.

    Results are kept beside the statistics as they are found: another process goes on with the next
    layer, another ratio measures nothing again.
    """
    file = directory / probe_file_name(recipe)
    known = known_probes(directory, recipe)
    missing = [layer for layer in layers if layer not in known]
    progress("probe", len(layers) - len(missing), len(layers), "")
    if not missing:
        return {layer: known[layer] for layer in layers}
    num_sequences, seq_len = ids_NS.shape
    split = split_sequences(num_sequences, seq_len)
    probed_NS = ids_NS[list(split.probed)]
    fitted_T = (torch.tensor(split.fitted)[:, None] * seq_len + torch.arange(seq_len)).flatten()
    activation = activation_of(checkpoint)
    model = StreamedModel(checkpoint, device=device)
    entering_NSD = model.embed_all(probed_NS, recipe.batch_size)
    dense_NSD = entering_NSD.clone()
    for layer in range(checkpoint.num_layers):
        model.run_sequences(layer, dense_NSD, recipe.batch_size)
    for layer in range(max(missing) + 1):
        if layer not in missing:
            model.run_sequences(layer, entering_NSD, recipe.batch_size)
            continue
        statistics = _rows(LayerStatistics.load(statistics_file(directory, layer)), fitted_T)
        problem = layer_problem(checkpoint, recipe, layer, statistics, activation, device)
        routed = observed_layer(model, layer, entering_NSD, recipe.batch_size, checkpoint.shape)
        names, states = [], []
        here = replace(problem, statistics=routed)
        y_TD = routed_output(routed, problem.experts, activation)
        with steady_sums(problem.shape, problem.device):
            candidates = _probes(problem)
        for name, factors in candidates:
            change_TD = stored_output(here, factors) - y_TD
            names.append(name)
            states.append(entering_NSD + change_TD.view_as(entering_NSD))
        for after in range(layer + 1, checkpoint.num_layers):
            for hidden_NSD in states:
                model.run_sequences(after, hidden_NSD, recipe.batch_size)
        losses = [mean_kl(model, dense_NSD, hidden_NSD) for hidden_NSD in states]
        known[layer] = dict(zip(names, losses, strict=True))
        write_file(file, [json.dumps(known).encode()])
        done = sum(other in known for other in layers)
        progress("probe", done, len(layers), f"layer {layer}")
    return {layer: known[layer] for layer in layers}


def observed_layer(
    model: StreamedModel, layer: int, hidden_NSD: torch.Tensor, batch_size: int, shape: MoEShape
) -> LayerStatistics:
    """Run a layer over all sequences, in place; returns what its experts saw."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def observe(x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> None:
        parts.append((x_TD.cpu().float(), index_TK.cpu().long(), gate_TK.cpu().float()))

    model.run_sequences(layer, hidden_NSD, batch_size, observe)
    x_TD, index_TK, gate_TK = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return LayerStatistics(
        x_TD=x_TD, index_TK=index_TK, gate_TK=gate_TK, num_experts=shape.num_experts
    )


def _probes(problem: LayerProblem) -> list[tuple[str, LayerFactors]]:
    """The layer compressed alone to each probed size, by the closed forms."""
    widths = probe_widths(problem.shape)
    probes: list[tuple[str, LayerFactors]] = [
        (f"narrow-{width}", solution.factors)
        for width, solution in zip(widths, solve_narrow(problem, widths), strict=True)
    ]
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation, problem.workers)
    for rank in probe_ranks(problem.shape):
        probes.append((f"latent-{rank}", solve_latent(problem, y_TD, rank, rank).factors))
    return probes


def _rows(statistics: LayerStatistics, token_n: torch.Tensor) -> LayerStatistics:
    return LayerStatistics(
        x_TD=statistics.x_TD[token_n],
        index_TK=statistics.index_TK[token_n],
        gate_TK=statistics.gate_TK[token_n],
        num_experts=statistics.num_experts,
    )


def mean_kl(model: StreamedModel, dense_NSD: torch.Tensor, hidden_NSD: torch.Tensor) -> float:
    """Mean KL(dense || compressed) per token, nats, one sequence at a time."""
    total = 0.0
    for sequence in range(len(dense_NSD)):
        rows = slice(sequence, sequence + 1)
        log_p = model.logits(dense_NSD[rows])[0].double().log_softmax(dim=-1)
        log_q = model.logits(hidden_NSD[rows])[0].double().log_softmax(dim=-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(0.0, total / dense_NSD.shape[:2].numel())
