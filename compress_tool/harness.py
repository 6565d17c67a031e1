"""A checkpoint, dense or factored, as a model of lm-evaluation-harness (extra `eval`).

Texts become tokens as in the harness's own `hf` model: by the checkpoint's tokenizer with the
special tokens it adds itself, and context and continuation together. Chat templates are not
applied. lm_eval is imported with this file, so only `tasks` imports it, and late.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compress_tool.checkpoint import Checkpoint
from compress_tool.corpus import open_tokenizer
from compress_tool.errors import InputError, UnsupportedError, UsageError
from compress_tool.greedy import generate_greedily
from compress_tool.likelihood import (
    Continuation,
    ProgressCallback,
    Row,
    longest_sequence,
    score_continuations,
)
from compress_tool.streaming import StreamedModel


class StreamedLM(TemplateLM):  # type: ignore[misc]
    """The harness's interface over a StreamedModel: one decoder layer in memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int,
        progress: ProgressCallback,
        device: str = "cpu",
    ) -> None:
        """Open tokenizer and model; `batch_size` sequences are computed at once."""
        super().__init__()
        self._checkpoint = checkpoint
        self._batch_size = batch_size
        self._progress = progress
        self._tokenizer = open_tokenizer(checkpoint.path)
        self._model = StreamedModel(checkpoint, device=device)
        self._device = torch.device(device)
        self._bos = self._special_token("bos")
        self._eos = self._special_token("eos")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._bos[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with None the tokenizer's own special tokens, unless the text has them."""
        if add_special_tokens is None:
            add_special_tokens = not (self._bos[1] and string.startswith(self._bos[1]))
        ids: list[int] = self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every request's continuation after its context."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = True,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scores = score_continuations(
            self._checkpoint,
            self._model,
            [
                Continuation(context=tuple(context), continuation=tuple(continuation))
                for _, context, continuation in requests
            ],
            batch_size=self._batch_size,
            progress=self._progress,
        )
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Iterable[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts, cut into windows as the harness's own models do."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        totals: list[float] = []
        for number, request in enumerate(requests):
            totals.append(0.0)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest_sequence(self._checkpoint),
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after every request's context, up to its stop strings. Slow: see `greedy`."""
        longest = longest_sequence(self._checkpoint)
        prompts: list[Row] = []
        max_new: list[int] = []
        stops: list[list[str]] = []
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, 256)
            if settings.get("do_sample"):
                raise UnsupportedError(
                    "a task samples its text (do_sample); only greedy decoding is supported here: "
                    "serve the model and use lm_eval against the server"
                )
            room = longest - settings["max_gen_toks"]
            if room < 1:
                raise UsageError(
                    f"a task generates {settings['max_gen_toks']} tokens, the model reads "
                    f"{longest} (max_position_embeddings); leave that task out"
                )
            prompts.append(tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,))
            max_new.append(settings["max_gen_toks"])
            stops.append(handle_stop_sequences(settings["until"], eos=self._eos[1] or None))

        def is_finished(number: int, ids: Row) -> bool:
            if ids[-1] == self.eot_token_id:
                return True
            text = self._tokenizer.decode(list(ids))
            return any(stop and stop in text for stop in stops[number])

        generated = generate_greedily(
            self._checkpoint,
            self._model,
            prompts,
            max_new_tokens=max_new,
            is_finished=is_finished,
            batch_size=self._batch_size,
            progress=self._progress,
        )
        return [
            postprocess_generated_text(self._tokenizer.decode(list(ids)), stop, None)
            for ids, stop in zip(generated, stops, strict=True)
        ]

    def _special_token(self, kind: str) -> tuple[int, str]:
        """Id and text of `bos` or `eos`: from tokenizer_config.json, else from config.json."""
        file = self._checkpoint.path / "tokenizer_config.json"
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise InputError(f"{file}: not JSON ({error})") from error
        token = settings.get(f"{kind}_token") if isinstance(settings, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (number := self._tokenizer.token_to_id(text)) is not None:
            return number, text
        given = self._checkpoint.config.get(f"{kind}_token_id")
        first = given[0] if isinstance(given, list) and given else given
        if isinstance(first, int):
            return first, self._tokenizer.id_to_token(first) or ""
        if kind == "bos":
            return self._special_token("eos")
        raise InputError(
            f"{file}: no eos_token, and no eos_token_id in config.json; tasks need one to begin "
            "and end texts"
        )
