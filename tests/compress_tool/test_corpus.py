"""Text files to token windows: deterministic, disjoint, complete, and clear about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_tool.corpus import default_calibration_text, eval_windows, token_windows
from compress_tool.errors import InputError
from tests.checkpoints import write_byte_tokenizer

HELDOUT_TEXT = Path(__file__).parents[2] / "examples" / "texts" / "heldout.txt"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write_byte_tokenizer(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def numbers(count: int) -> str:
    """Text in which every 8-byte word is different, so a window shows where it came from."""
    return "".join(f"{number:07} " for number in range(count))


def decode(ids: torch.Tensor) -> str:
    return bytes(byte_of()[token] for token in ids.tolist()).decode()


def byte_of() -> dict[int, int]:
    from tokenizers import pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols |= {chr(256 + position): byte for position, byte in enumerate(rest)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: symbols[symbol] for token, symbol in enumerate(alphabet)}


def test_windows_are_disjoint_pieces_spread_over_the_text(checkpoint, tmp_path):
    text = numbers(1000)
    file = write_text(tmp_path / "a.txt", text)
    windows = token_windows(checkpoint, [file], seq_len=64, samples=10, seed=1)
    assert windows.ids_NS.shape == (10, 64)
    assert windows.ids_NS.dtype == torch.int64
    assert windows.num_tokens == 8000
    assert windows.warnings == ()
    starts = [text.index(decode(window)) for window in windows.ids_NS]
    for number, start in enumerate(starts):
        assert number * 800 <= start <= (number + 1) * 800 - 64


def test_the_same_seed_gives_the_same_windows_and_another_does_not(checkpoint, tmp_path):
    file = write_text(tmp_path / "a.txt", numbers(1000))

    def draw(seed: int) -> torch.Tensor:
        return token_windows(checkpoint, [file], seq_len=32, samples=8, seed=seed).ids_NS

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_fewer_windows_than_asked_is_a_warning(checkpoint, tmp_path):
    file = write_text(tmp_path / "a.txt", numbers(10))
    windows = token_windows(checkpoint, [file], seq_len=30, samples=128, seed=0)
    assert windows.ids_NS.shape == (2, 30)
    assert len(windows.warnings) == 1
    assert "128 windows of 30 tokens asked" in windows.warnings[0]
    assert "80 tokens found" in windows.warnings[0]


def test_no_number_of_samples_means_all_full_windows(checkpoint, tmp_path):
    file = write_text(tmp_path / "a.txt", numbers(10))
    windows = token_windows(checkpoint, [file], seq_len=30, samples=None, seed=0)
    assert windows.ids_NS.shape == (2, 30)
    assert windows.warnings == ()


@pytest.mark.parametrize("text", ["", "  \n", "too short"])
def test_text_without_one_window_says_what_was_found_and_needed(checkpoint, tmp_path, text):
    file = write_text(tmp_path / "a.txt", text)
    found = len(text) if text.strip() else 0
    with pytest.raises(InputError, match=f"{found} tokens found, at least 10 are needed"):
        token_windows(checkpoint, [file], seq_len=10, samples=4, seed=0)


def test_jsonl_gives_the_texts_one_after_the_other(checkpoint, tmp_path):
    lines = [json.dumps({"text": "ab\u2028", "other": 1}), "", json.dumps({"text": "cd"})]
    file = write_text(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    windows = token_windows(checkpoint, [file], seq_len=7, samples=1, seed=0)
    assert decode(windows.ids_NS[0]) == "ab\u2028cd"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ('{"content": "x"}', 'a.jsonl:2: no string under the key "text"'),
        ('{"text": 5}', "a.jsonl:2: no string"),
        ("[]", "a.jsonl:2: no string"),
    ],
)
def test_a_bad_jsonl_line_is_named(checkpoint, tmp_path, line, message):
    file = write_text(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        token_windows(checkpoint, [file], seq_len=2, samples=1, seed=0)


def test_bytes_that_are_not_utf8_are_named_by_offset(checkpoint, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"a\.txt: byte 3 is not UTF-8"):
        token_windows(checkpoint, [file], seq_len=2, samples=1, seed=0)


def test_a_missing_file_is_an_input_error(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read"):
        token_windows(checkpoint, [tmp_path / "absent.txt"], seq_len=2, samples=1, seed=0)


def test_no_file_is_an_input_error(checkpoint):
    with pytest.raises(InputError, match="no text file given"):
        token_windows(checkpoint, [], seq_len=2, samples=1, seed=0)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": {"type": "Nothing"}}'])
def test_a_broken_tokenizer_is_an_input_error(checkpoint, tmp_path, content):
    file = write_text(tmp_path / "a.txt", "abcdef")
    tokenizer = checkpoint / "tokenizer.json"
    tokenizer.unlink()
    if content is not None:
        tokenizer.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: not"):
        token_windows(checkpoint, [file], seq_len=2, samples=1, seed=0)


def test_padding_and_truncation_of_the_tokenizer_file_are_ignored(checkpoint, tmp_path):
    file = write_text(tmp_path / "a.txt", numbers(10))
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    windows = token_windows(checkpoint, [file], seq_len=80, samples=1, seed=0)
    assert windows.num_tokens == 80


def test_evaluation_covers_every_token_of_every_file_once(checkpoint, tmp_path):
    texts = [numbers(10), "x" * 20, "yz"]
    files = [write_text(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts)]
    groups = eval_windows(checkpoint, files, seq_len=20)
    assert [tuple(group.shape) for group in groups] == [(4, 20), (1, 20), (1, 2)]
    assert "".join(decode(group.flatten()) for group in groups) == "".join(texts)


def test_the_rest_of_a_file_is_a_shorter_window(checkpoint, tmp_path):
    file = write_text(tmp_path / "a.txt", "x" * 25)
    groups = eval_windows(checkpoint, [file], seq_len=10)
    assert [tuple(group.shape) for group in groups] == [(2, 10), (1, 5)]


@pytest.mark.parametrize("text", ["", "a"])
def test_evaluation_needs_two_tokens_per_file(checkpoint, tmp_path, text):
    file = write_text(tmp_path / "a.txt", text)
    with pytest.raises(InputError, match=f"{len(text)} tokens found, at least 2"):
        eval_windows(checkpoint, [file], seq_len=10)


def test_bundled_calibration_text_is_small_and_big_enough():
    size = default_calibration_text().stat().st_size
    assert 600_000 <= size <= 2_000_000


def test_bundled_calibration_and_heldout_text_have_no_passage_in_common():
    calibration = default_calibration_text().read_text(encoding="utf-8")
    heldout = HELDOUT_TEXT.read_text(encoding="utf-8")
    passages = {heldout[i : i + 60] for i in range(len(heldout) - 60)}
    assert not any(calibration[i : i + 60] in passages for i in range(len(calibration) - 60))
