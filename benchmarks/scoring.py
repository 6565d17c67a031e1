"""Scores of a compressed model beside its dense source, on fixed windows and fixed questions.

The dense model's last hidden states are kept, so that comparing costs one head and not one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.continuation import requests_of, share_right
from compress_tool.checkpoint import Checkpoint
from compress_tool.continuation import Question
from compress_tool.likelihood import score_continuations
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

    The same code as `compress_tool eval --tasks continuation`, without the harness around it: its
    `acc` is this number.
    """
    scores = score_continuations(
        checkpoint,
        model,
        requests_of(checkpoint.path, questions),
        batch_size=BATCH_SIZE,
        progress=lambda stage, done, total, detail: None,
    )
    return share_right([score.log_likelihood for score in scores], questions)
