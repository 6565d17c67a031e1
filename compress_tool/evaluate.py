"""How well a checkpoint predicts text: perplexity, distance to another checkpoint, and tasks.

Every token of the text is scored once, except the first of each window. Sums are fp64 and exact
(`math.fsum`), so the order of the windows changes nothing.

Memory: the hidden states of the whole text, once per checkpoint, one part of a model at a time
(two heads at the end, with `against`), and the logits of one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from compress_tool.checkpoint import EMBEDDING, Checkpoint, open_checkpoint
from compress_tool.corpus import eval_windows
from compress_tool.dynamic_prune import with_dynamic_prune
from compress_tool.errors import InputError, NumericsError, UsageError
from compress_tool.streaming import StreamedModel
from compress_tool.tasks import load_tasks, run_tasks, task_names

SCORE_ROWS: Final = 256
"""Positions turned into fp64 probabilities at once: 64 MB for a vocabulary of 32,000."""

MAX_MEAN_LOSS: Final = 690.0
"""Above it exp() leaves the range of a float; no trained model comes near."""

ProgressCallback = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Means over the `tokens` scored; `kl` (nats) and `agreement` are None without `against`.

    `kl` is KL(against || checkpoint); `agreement` the share of positions with the same best token.
    """

    perplexity: float
    tokens: int
    kl: float | None
    agreement: float | None


def evaluate_all(
    path: Path,
    *,
    against: Path | None,
    files: Sequence[Path],
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    seq_len: int,
    batch_size: int,
    device: str,
    progress: ProgressCallback,
    dynamic_prune: float | None = None,
) -> dict[str, Any]:
    """What `compress_tool eval` prints: scores on the texts `files` and on `tasks`, either or both.

    `perplexity`, `tokens`, `kl` and `agreement` are None without texts. `tasks` holds per task what
    `run_tasks` gives, and with `against` the other model's under `against`. Everything is opened
    and checked before anything is computed; raises the ToolError that says what is wrong.
    """
    _check_options(files, tasks, limit, num_fewshot, batch_size, dynamic_prune)
    checkpoint = open_checkpoint(path, allow_factored=True)
    if dynamic_prune is not None:
        checkpoint = with_dynamic_prune(checkpoint, dynamic_prune)
    other = None if against is None else open_checkpoint(against, allow_factored=True)
    loaded = None if tasks is None else load_tasks(task_names(tasks), files)
    result: dict[str, Any] = dict.fromkeys(("perplexity", "tokens", "kl", "agreement"))
    if files:
        scored = evaluate(
            checkpoint,
            files,
            seq_len=seq_len,
            batch_size=batch_size,
            against=other,
            progress=progress,
            device=device,
        )
        result |= asdict(scored)
    result |= {"dynamic_prune": dynamic_prune}
    result |= {"seq_len": seq_len, "text": [str(file) for file in files], "tasks": {}}
    for scores, model in ((result["tasks"], checkpoint), ({}, other)):
        if loaded is None or model is None:
            continue
        scores |= run_tasks(
            model,
            loaded,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            progress=progress,
            device=device,
        )
        if model is other:
            for name, values in scores.items():
                result["tasks"][name]["against"] = values
    return result


def evaluate(
    checkpoint: Checkpoint,
    files: Sequence[Path],
    *,
    seq_len: int,
    batch_size: int,
    against: Checkpoint | None,
    progress: ProgressCallback,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EvalResult:
    """Score all text of `files` in consecutive windows of `seq_len` tokens.

    Raises InputError for bad text or when the two checkpoints read it as different tokens,
    NumericsError when logits are not finite.
    """
    if seq_len < 2:
        raise UsageError(f"--seq-len is {seq_len}, evaluation needs windows of at least 2 tokens")
    groups = eval_windows(checkpoint.path, files, seq_len=seq_len)
    if against is not None:
        _check_same_tokens(checkpoint, against, groups, files, seq_len)
    return evaluate_windows(
        checkpoint,
        groups,
        batch_size=batch_size,
        against=against,
        progress=progress,
        device=device,
        dtype=dtype,
    )


def evaluate_windows(
    checkpoint: Checkpoint,
    groups: Sequence[torch.Tensor],
    *,
    batch_size: int,
    against: Checkpoint | None,
    progress: ProgressCallback,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EvalResult:
    """Score windows of token ids, given as groups `ids_NS` of equal length."""
    checkpoints = [checkpoint] if against is None else [checkpoint, against]
    num_layers = sum(item.num_layers for item in checkpoints)
    models, states, done = [], [], 0
    for item in checkpoints:
        model = StreamedModel(item, device=device, dtype=dtype)
        states.append([model.embed_all(ids_NS, batch_size) for ids_NS in groups])
        for layer in range(item.num_layers):
            progress("evaluate", done, num_layers, f"layer {layer} of {item.path.name}")
            for hidden_NSD in states[-1]:
                model.run_layer(layer, hidden_NSD, batch_size)
            done += 1
        model.free()
        models.append(model)
    progress("evaluate", num_layers, num_layers, "")
    scores: list[_WindowScore] = []
    num_windows = sum(map(len, groups))
    for group, ids_NS in enumerate(groups):
        for window, ids_S in enumerate(ids_NS):
            progress("score", len(scores), num_windows, "windows of text")
            rows = slice(window, window + 1)
            logits = [m.logits(s[group][rows])[0] for m, s in zip(models, states, strict=True)]
            scores.append(_score(ids_S, logits[0], logits[1] if against is not None else None))
    progress("score", num_windows, num_windows, "")
    return _total(checkpoint, scores, compared=against is not None)


def _check_options(
    files: Sequence[Path],
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    dynamic_prune: float | None,
) -> None:
    if not files and tasks is None:
        raise UsageError("eval needs --text, --tasks or both; nothing was given to score")
    if batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}, expected at least 1")
    for flag, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and tasks is None:
            raise UsageError(f"{flag} is about --tasks, and no task is named")
        if value is not None and value < least:
            raise UsageError(f"{flag} is {value}, expected at least {least}")
    if dynamic_prune is not None and tasks is not None:
        raise UsageError(
            "--dynamic-prune chooses neurons by all tokens of a batch, and the batches of --tasks "
            "are padded; use it with --text alone"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _WindowScore:
    """Sums over the scored positions of one window, in nats and counts."""

    tokens: int
    loss: float
    kl: float
    agreed: int


def _score(
    ids_S: torch.Tensor, logits_SV: torch.Tensor, against_SV: torch.Tensor | None
) -> _WindowScore:
    """The logits at position t are judged on the token at t + 1; the last have nothing to say."""
    target_S = ids_S[1:].to(logits_SV.device)
    loss, kl, agreed = [], [], 0
    for start in range(0, len(target_S), SCORE_ROWS):
        rows = slice(start, min(start + SCORE_ROWS, len(target_S)))
        log_q = logits_SV[rows].double().log_softmax(dim=-1)
        loss.append(float(-log_q.gather(1, target_S[rows, None]).sum()))
        if against_SV is not None:
            log_p = against_SV[rows].double().log_softmax(dim=-1)
            kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
            agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
    return _WindowScore(tokens=len(target_S), loss=math.fsum(loss), kl=math.fsum(kl), agreed=agreed)


def _total(checkpoint: Checkpoint, scores: Sequence[_WindowScore], *, compared: bool) -> EvalResult:
    tokens = sum(score.tokens for score in scores)
    mean_loss = math.fsum(score.loss for score in scores) / tokens
    if not mean_loss < MAX_MEAN_LOSS:
        raise NumericsError(
            f"{checkpoint.path}: the mean loss per token is {mean_loss}, so the perplexity is not "
            "a number; the weights are broken"
        )
    return EvalResult(
        perplexity=math.exp(mean_loss),
        tokens=tokens,
        # Rounding can leave a sum of exact zeros slightly negative.
        kl=max(0.0, math.fsum(score.kl for score in scores) / tokens) if compared else None,
        agreement=sum(score.agreed for score in scores) / tokens if compared else None,
    )


def _check_same_tokens(
    checkpoint: Checkpoint,
    against: Checkpoint,
    groups: Sequence[torch.Tensor],
    files: Sequence[Path],
    seq_len: int,
) -> None:
    vocab, other_vocab = (item.tensors[EMBEDDING].shape[0] for item in (checkpoint, against))
    other = eval_windows(against.path, files, seq_len=seq_len)
    same_ids = len(groups) == len(other) and all(map(torch.equal, groups, other))
    if vocab != other_vocab or not same_ids:
        raise InputError(
            f"{against.path}: its tokenizer or vocabulary ({other_vocab} tokens) differs from that "
            f"of {checkpoint.path} ({vocab} tokens); compare a checkpoint with its own source"
        )
