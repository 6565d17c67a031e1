"""Text in, token windows out: for calibration a seeded choice, for evaluation all of them.

A file is plain UTF-8 text, or JSONL (`*.jsonl`) with one `{"text": ...}` object per line. Each
text is tokenised by the checkpoint's own `tokenizer.json`, with the special tokens it adds
itself, and the texts of a file are joined into one stream.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from compress_tool.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWindows:
    """Calibration windows `ids_NS` (int64), the tokens found, and what the user should know."""

    ids_NS: torch.Tensor
    num_tokens: int
    warnings: tuple[str, ...]


def default_calibration_text() -> Path:
    """The public-domain text that comes with the package; see `data/README.md`."""
    return Path(__file__).parent / "data" / "calibration.txt"


def token_windows(
    checkpoint_path: Path,
    files: Sequence[Path],
    *,
    seq_len: int,
    samples: int | None,
    seed: int,
) -> TokenWindows:
    """Choose `samples` windows of `seq_len` tokens spread over the text (None: all there are).

    The text is cut into `samples` equal stretches and one window is drawn from each, so windows
    never overlap and the same seed gives the same windows. A text with fewer full windows gives
    those, with a warning; one with no full window raises InputError, and so does bad text.
    """
    stream = torch.cat(_streams(checkpoint_path, files))
    num_tokens = len(stream)
    available = num_tokens // seq_len
    names = ", ".join(str(file) for file in files)
    if available == 0:
        raise InputError(
            f"{names}: {num_tokens} tokens found, at least {seq_len} are needed for one window; "
            "give more text or a smaller --seq-len"
        )
    warnings: tuple[str, ...] = ()
    if samples is not None and samples > available:
        warnings = (
            f"{names}: {samples} windows of {seq_len} tokens asked, the {num_tokens} tokens found "
            f"are enough for {available}; going on with {available}",
        )
    count = available if samples is None else min(samples, available)
    draw = random.Random(seed)
    windows = []
    for window in range(count):
        first = window * num_tokens // count
        last = (window + 1) * num_tokens // count - seq_len
        start = draw.randint(first, last)
        windows.append(stream[start : start + seq_len])
    return TokenWindows(ids_NS=torch.stack(windows), num_tokens=num_tokens, warnings=warnings)


def eval_windows(
    checkpoint_path: Path, files: Sequence[Path], *, seq_len: int
) -> list[torch.Tensor]:
    """Consecutive windows that cover every token of every file, as groups of equal length.

    Each group is `ids_NS`: per file one with all full windows, and one with the shorter rest, if
    there is one. Windows never span two files, so the order of the files changes nothing.
    """
    groups = []
    for file, stream in zip(files, _streams(checkpoint_path, files), strict=True):
        if len(stream) < 2:
            raise InputError(
                f"{file}: {len(stream)} tokens found, at least 2 are needed to score one; "
                "give more text"
            )
        full = len(stream) // seq_len * seq_len
        groups.append(stream[:full].view(-1, seq_len))
        groups.append(stream[full:].view(1, -1))
    return [group for group in groups if group.numel()]


def _streams(checkpoint_path: Path, files: Sequence[Path]) -> list[torch.Tensor]:
    """The token stream of each file, int64."""
    if not files:
        raise InputError("no text file given; name at least one text or JSONL file")
    texts = [list(read_texts(file)) for file in files]
    tokenizer = open_tokenizer(checkpoint_path)
    streams = []
    for file_texts in texts:
        ids = [token for text in file_texts for token in tokenizer.encode(text).ids]
        streams.append(torch.tensor(ids, dtype=torch.int64))
    return streams


def read_texts(file: Path) -> Iterator[str]:
    """The texts of a file in order: all of a text file, or each line's of a JSONL file.

    Raises InputError for a file that cannot be read, is not UTF-8, or has a line that is wrong.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); expected a text or JSONL file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8 first"
        ) from error
    if file.suffix != ".jsonl":
        if text.strip():
            yield text
        return
    # Only "\n" ends a JSONL line: splitlines() would also cut at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f'{file}:{number}: not JSON ({error}); expected {{"text": "..."}} on every line'
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(
                f'{file}:{number}: no string under the key "text"; expected {{"text": "..."}} '
                "on every line"
            )
        yield record["text"]


def open_tokenizer(checkpoint_path: Path) -> Tokenizer:
    """The checkpoint's `tokenizer.json`, without padding and truncation; InputError without it."""
    path = checkpoint_path / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path}: not found, needed to tokenise text; copy the model's tokenizer.json there"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any broken file
        raise InputError(f"{path}: not a tokenizer file ({error})") from error
    # A file may carry the padding and truncation of its last training run; neither belongs here.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
