"""Which text a recipe calibrates on, as token windows no longer than the model's positions."""

from __future__ import annotations

from pathlib import Path

from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.corpus import TokenWindows, default_calibration_text, token_windows
from compress_tool.errors import InputError


def calibration_files(recipe: Recipe) -> list[Path]:
    """The recipe's own files, or the text that comes with the package."""
    return [Path(name) for name in recipe.calibration] or [default_calibration_text()]


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe) -> TokenWindows:
    """The recipe's windows over its files.

    The default length shrinks to `max_position_embeddings`; one that was asked for is refused with
    an InputError where it is longer.
    """
    longest = checkpoint.config.get("max_position_embeddings")
    seq_len = recipe.seq_len
    if isinstance(longest, int) and seq_len > longest:
        if seq_len != Recipe(ratio=0.5).seq_len:
            raise InputError(
                f"--seq-len is {seq_len}, the model's max_position_embeddings is {longest}; "
                "use a smaller --seq-len"
            )
        seq_len = longest
    return token_windows(
        checkpoint.path,
        calibration_files(recipe),
        seq_len=seq_len,
        samples=recipe.samples,
        seed=recipe.seed,
    )
