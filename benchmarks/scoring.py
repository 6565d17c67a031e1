"""Scores of a compressed model beside its dense source, on fixed windows and fixed questions.

The dense model's last hidden states are kept, so that comparing costs one head and not one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.continuation import Question, pairs, pick
from compress_tool.checkpoint import Checkpoint
from compress_tool.streaming import StreamedModel

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """Perplexity over all positions but the first of each window, KL(dense || model) in nats."""

    perplexity: float
    kl: float
    agreement: float


def hidden_states(model: StreamedModel, num_layers: int, ids_NS: torch.Tensor) -> torch.Tensor:
    """What leaves the last layer, [N, S, D]."""
    hidden_NSD = model.embed_all(ids_NS, BATCH_SIZE)
    for layer in range(num_layers):
        model.run_layer(layer, hidden_NSD, BATCH_SIZE)
    return hidden_NSD


def score_text(
    model: StreamedModel,
    hidden_NSD: torch.Tensor,
    dense: StreamedModel,
    dense_NSD: torch.Tensor,
    ids_NS: torch.Tensor,
) -> TextScore:
    """Compare two models on the same windows, four windows of logits in memory at a time."""
    losses, kls, agreed = [], [], 0
    for start in range(0, len(ids_NS), 4):
        rows = slice(start, start + 4)
        log_q = model.logits(hidden_NSD[rows])[:, :-1].log_softmax(dim=-1)
        log_p = dense.logits(dense_NSD[rows])[:, :-1].log_softmax(dim=-1)
        losses.append(-log_q.gather(2, ids_NS[rows, 1:, None]).double().sum().item())
        kls.append((log_p.exp() * (log_p - log_q)).double().sum().item())
        agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
    tokens = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    return TextScore(
        perplexity=math.exp(math.fsum(losses) / tokens),
        kl=math.fsum(kls) / tokens,
        agreement=agreed / tokens,
    )


def accuracy(checkpoint: Checkpoint, model: StreamedModel, questions: Sequence[Question]) -> float:
    """Share of questions whose true continuation has the highest log-likelihood.

    As lm-evaluation-harness scores `acc` of a multiple-choice task: context and continuation are
    tokenised together, and the log-probabilities of the continuation's tokens are added.
    """
    requests = pairs(checkpoint.path, questions)
    longest = max(len(ids) for ids, _ in requests)
    ids_NS = torch.zeros(len(requests), longest, dtype=torch.int64)
    for row, (ids, _) in enumerate(requests):
        # Padding on the right: causal attention keeps it from changing what stands before it.
        ids_NS[row, : len(ids)] = torch.tensor(ids)
    hidden_NSD = hidden_states(model, checkpoint.num_layers, ids_NS)
    row_P = torch.tensor([row for row, (ids, first) in enumerate(requests) for _ in ids[first:]])
    at_P = torch.tensor([at for ids, first in requests for at in range(first - 1, len(ids) - 1)])
    scores_N = torch.zeros(len(requests), dtype=torch.float64)
    for part in torch.arange(len(row_P)).split(1024):
        row, at = row_P[part], at_P[part]
        log_PV = model.logits(hidden_NSD[row, at][None])[0].log_softmax(-1)
        chosen_P = log_PV.gather(1, ids_NS[row, at + 1][:, None])[:, 0]
        scores_N.index_add_(0, row, chosen_P.double())
    return pick(scores_N.tolist(), questions)
