"""Log-likelihood of continuations under a streamed model: many token sequences, layer by layer.

All sequences pass one decoder layer before the next one is read, so a whole task costs one reading
of the checkpoint for every HIDDEN_BYTES of hidden states. Shorter sequences of a batch are padded
on the right, where causal attention keeps the padding from changing anything.

Memory: HIDDEN_BYTES (or one sequence, if that is more), one decoder layer, the activations of one
batch, and the logits of HEAD_ROWS positions. Nothing grows with the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.errors import InputError, NumericsError
from compress_tool.streaming import StreamedModel

HIDDEN_BYTES: Final = 2**31
"""Hidden states kept at once: 131,072 tokens of a model 4096 wide. More saves disk reads."""

LENGTH_STEP: Final = 32
"""Sequences are padded to multiples of it: few batch shapes, and at most 31 wasted positions."""

HEAD_ROWS: Final = 256
"""Positions turned into fp64 probabilities at once: 64 MB for a vocabulary of 32,000."""

DEFAULT_LONGEST: Final = 2048
"""Where config.json names no max_position_embeddings; lm-evaluation-harness takes the same."""

ProgressCallback = Callable[[str, int, int, str], None]

Row = tuple[int, ...]
"""Token ids of one sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """Score `continuation` after `context`, both token ids, neither empty."""

    context: Row
    continuation: Row


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationScore:
    """Sum of the natural log-probabilities, and whether greedy decoding would give the same."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Sequences of one padded length: their numbers, and ids [N, S]."""

    rows: tuple[int, ...]
    ids_NS: torch.Tensor


def longest_sequence(checkpoint: Checkpoint) -> int:
    """Tokens that the model reads at most."""
    value = checkpoint.config.get("max_position_embeddings")
    return value if isinstance(value, int) else DEFAULT_LONGEST


def score_continuations(
    checkpoint: Checkpoint,
    model: StreamedModel,
    requests: Sequence[Continuation],
    *,
    batch_size: int,
    progress: ProgressCallback,
    hidden_bytes: int = HIDDEN_BYTES,
) -> list[ContinuationScore]:
    """One score per request, in order. Too long contexts lose their beginning.

    Equal inputs are computed once: the choices of one token of a question share theirs. Raises
    InputError for a continuation that the model cannot read whole, NumericsError when a score is
    not finite.
    """
    longest = longest_sequence(checkpoint)
    row_of: dict[Row, int] = {}
    entries: list[tuple[int, int]] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, request in enumerate(requests):
        if len(request.continuation) > longest:
            raise InputError(
                f"{checkpoint.path}: a text of {len(request.continuation)} tokens is to be scored, "
                f"the model reads {longest} (max_position_embeddings); leave that task out"
            )
        # The last token is judged and never read, so one more than the model reads can be used.
        ids = (request.context + request.continuation)[-(longest + 1) :]
        row = row_of.setdefault(ids[:-1], len(row_of))
        for at in range(len(ids) - len(request.continuation), len(ids)):
            # The logits at position t are judged on the token at t + 1.
            entries.append((row, at - 1))
            targets.append(ids[at])
            owners.append(number)
    score_P = torch.zeros(len(entries), dtype=torch.float64)
    is_best_P = torch.zeros(len(entries), dtype=torch.bool)
    target_P = torch.tensor(targets, dtype=torch.int64)
    for entry_p, logits_pV in logits_at(
        checkpoint,
        model,
        list(row_of),
        entries,
        batch_size=batch_size,
        hidden_bytes=hidden_bytes,
        on_layer=lambda done, total, detail: progress("tasks", done, total, detail),
    ):
        target_p = target_P[entry_p].to(logits_pV.device)
        log_pV = logits_pV.double().log_softmax(dim=-1)
        score_P[entry_p] = log_pV.gather(1, target_p[:, None])[:, 0].cpu()
        is_best_P[entry_p] = (logits_pV.argmax(dim=-1) == target_p).cpu()
    if not bool(score_P.isfinite().all()):
        raise NumericsError(
            f"{checkpoint.path}: a log-probability is not a finite number; the weights are broken"
        )
    parts: list[list[float]] = [[] for _ in requests]
    is_greedy = [True] * len(requests)
    for owner, score, is_best in zip(owners, score_P.tolist(), is_best_P.tolist(), strict=True):
        parts[owner].append(score)
        is_greedy[owner] &= is_best
    return [
        ContinuationScore(log_likelihood=math.fsum(part), is_greedy=greedy)
        for part, greedy in zip(parts, is_greedy, strict=True)
    ]


def logits_at(
    checkpoint: Checkpoint,
    model: StreamedModel,
    rows: Sequence[Row],
    entries: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    hidden_bytes: int = HIDDEN_BYTES,
    on_layer: Callable[[int, int, str], None],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of `rows` (token ids) at `entries` (row, position): every entry once, in any order.

    Yields entry numbers [p] (int64) and their logits [p, V] (fp32, on the model's device).
    `on_layer(done, total, detail)` is called before every decoder layer and at the end. Rows are
    no longer than `longest_sequence`.
    """
    by_row: list[list[int]] = [[] for _ in rows]
    for number, (row, _) in enumerate(entries):
        by_row[row].append(number)
    at_P = torch.tensor([at for _, at in entries], dtype=torch.int64)
    passes = _passes(rows, longest_sequence(checkpoint), _tokens(checkpoint, hidden_bytes))
    total, done = len(passes) * checkpoint.num_layers, 0
    for number, groups in enumerate(passes):
        states = [model.embed_all(group.ids_NS, batch_size) for group in groups]
        for layer in range(checkpoint.num_layers):
            part = f", part {number + 1} of {len(passes)}" if len(passes) > 1 else ""
            on_layer(done, total, f"layer {layer}{part}")
            for hidden_NSD in states:
                model.run_layer(layer, hidden_NSD, batch_size)
            done += 1
        for group, hidden_NSD in zip(groups, states, strict=True):
            entry_P = torch.tensor([n for row in group.rows for n in by_row[row]])
            within = {row: index for index, row in enumerate(group.rows)}
            index_P = torch.tensor([within[entries[int(n)][0]] for n in entry_P])
            for part_p in torch.split(torch.arange(len(entry_P)), HEAD_ROWS):
                entry_p = entry_P[part_p]
                hidden_pD = hidden_NSD[index_P[part_p], at_P[entry_p]]
                yield entry_p, model.logits(hidden_pD[None])[0]
    on_layer(total, total, "")


def _tokens(checkpoint: Checkpoint, hidden_bytes: int) -> int:
    return max(1, hidden_bytes // (4 * checkpoint.shape.hidden_size))


def _passes(rows: Sequence[Row], longest: int, max_tokens: int) -> list[list[_Group]]:
    """All rows, longest first, in passes of at most `max_tokens` padded tokens (or one row)."""
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), rows[row]))
    passes: list[list[_Group]] = []
    members: dict[int, list[int]] = {}
    tokens = 0
    for row in order:
        padded = min(longest, -(-len(rows[row]) // LENGTH_STEP) * LENGTH_STEP)
        if members and tokens + padded > max_tokens:
            passes.append(_groups(rows, members))
            members, tokens = {}, 0
        members.setdefault(padded, []).append(row)
        tokens += padded
    if members:
        passes.append(_groups(rows, members))
    return passes


def _groups(rows: Sequence[Row], members: dict[int, list[int]]) -> list[_Group]:
    groups = []
    for padded, numbers in members.items():
        ids_NS = torch.zeros(len(numbers), padded, dtype=torch.int64)
        for index, number in enumerate(numbers):
            ids_NS[index, : len(rows[number])] = torch.tensor(rows[number])
        groups.append(_Group(rows=tuple(numbers), ids_NS=ids_NS))
    return groups
