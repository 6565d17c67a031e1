"""Greedy decoding with a streamed model, for tasks that are judged on generated text.

There is no key-value cache: it would grow with the number of layers. Every new token is one more
pass of all unfinished texts through the whole checkpoint. That is right for a few hundred tokens
of a small model, and for a large one it is slow: serve it and use `lm_eval` against the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress_tool.checkpoint import Checkpoint
from compress_tool.likelihood import ProgressCallback, Row, logits_at
from compress_tool.streaming import StreamedModel


def generate_greedily(
    checkpoint: Checkpoint,
    model: StreamedModel,
    prompts: Sequence[Row],
    *,
    max_new_tokens: Sequence[int],
    is_finished: Callable[[int, Row], bool],
    batch_size: int,
    progress: ProgressCallback,
) -> list[Row]:
    """New token ids after each of `prompts` (none empty), the most probable one at a time.

    Text `i` ends after `max_new_tokens[i]` tokens, or when `is_finished(i, new_ids)`; the token
    that ended it is part of the result. Memory as in `likelihood`.
    """
    new: list[Row] = [() for _ in prompts]
    active = [number for number, most in enumerate(max_new_tokens) if most > 0]
    steps = max(max_new_tokens, default=0)
    for step in range(steps):
        if not active:
            break
        progress("generate", step, steps, f"{len(active)} of {len(prompts)} texts go on")
        rows = [prompts[number] + new[number] for number in active]
        for entry_p, logits_pV in logits_at(
            checkpoint,
            model,
            rows,
            [(index, len(row) - 1) for index, row in enumerate(rows)],
            batch_size=batch_size,
            on_layer=lambda done, total, detail: None,
        ):
            for entry, token in zip(entry_p.tolist(), logits_pV.argmax(-1).tolist(), strict=True):
                new[active[entry]] += (token,)
        active = [
            number
            for number in active
            if len(new[number]) < max_new_tokens[number] and not is_finished(number, new[number])
        ]
    progress("generate", steps, steps, "")
    return new
