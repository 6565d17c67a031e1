"""The tensors of a local checkpoint folder, checked from the safetensors headers alone.

The same ledger as at load time, without reading a weight: a broken checkpoint stops `vllm serve`
in its first process, with the name of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from vllm_moesvd.format import Family
from vllm_moesvd.loading import IGNORED_SUFFIX, LoadingError, open_ledger, read_plan

INDEX_FILE: Final = "model.safetensors.index.json"


def audit_folder(path: str, family: Family, hf_config: Any) -> None:
    """Raise LoadingError unless the folder holds exactly the tensors that config.json promises.

    A `path` that is no local folder (a name on the Hugging Face hub) is left to the loader.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    ledger = open_ledger(read_plan(family, hf_config), hf_config)
    for file in _weight_files(folder):
        for name, shape in _header(file).items():
            if name.endswith(IGNORED_SUFFIX):
                continue
            try:
                ledger.receive(name, shape)
            except LoadingError as error:
                raise LoadingError(f"{error} ({file})") from None
    try:
        ledger.close()
    except LoadingError as error:
        raise LoadingError(f"{error} ({folder})") from None


def _weight_files(folder: Path) -> list[Path]:
    """The files that vLLM will read: those of the index, or every safetensors file."""
    present = sorted(folder.glob("*.safetensors"))
    if not present:
        raise LoadingError(
            f"moesvd: {folder}: holds no .safetensors file; factored checkpoints have no other"
        )
    index = folder / INDEX_FILE
    if not index.exists():
        return present
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadingError(f"moesvd: {index}: not a safetensors index: {error!r}") from None
    for name in named:
        if folder / str(name) not in present:
            raise LoadingError(
                f"moesvd: {index}: names {name!r}, which is no .safetensors file of this folder; "
                "download the checkpoint again"
            )
    return [folder / name for name in named]


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise LoadingError(
            f"moesvd: {file}: cannot be read as safetensors ({error}); download it again"
        ) from None
