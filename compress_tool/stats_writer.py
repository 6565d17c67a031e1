"""The file of one layer's statistics, written as the batches come: complete, or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from compress_tool.durable import TEMPORARY_SUFFIX, storage_errors, sync_folder
from compress_tool.errors import NumericsError


class StatisticsWriter:
    """Writes a LayerStatistics file batch by batch, so X never has to be in memory as a whole.

    A context manager: leaving it normally syncs the file and gives it its name; leaving it by an
    exception, or with fewer than `num_tokens` tokens added, removes what was written.
    """

    def __init__(
        self, path: Path, *, num_tokens: int, hidden_size: int, top_k: int, num_experts: int
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + TEMPORARY_SUFFIX)
        self._num_tokens = num_tokens
        self._num_experts = num_experts
        index_bytes, gate_bytes = num_tokens * top_k * 8, num_tokens * top_k * 4
        x_end = index_bytes + gate_bytes + num_tokens * hidden_size * 4
        # The int64 tensor comes first: then all three are aligned, whatever T, K and D are.
        entries = (
            ("index_TK", "I64", top_k, 0, index_bytes),
            ("gate_TK", "F32", top_k, index_bytes, index_bytes + gate_bytes),
            ("x_TD", "F32", hidden_size, index_bytes + gate_bytes, x_end),
        )
        header: dict[str, object] = {"__metadata__": {"num_experts": str(num_experts)}}
        for name, dtype, columns, start, end in entries:
            header[name] = {
                "dtype": dtype,
                "shape": [num_tokens, columns],
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._index_at = 8 + len(text)
        self._gate_at = self._index_at + index_bytes
        self._x_at = self._gate_at + gate_bytes
        self.num_written = 0
        with storage_errors(path):
            self._file = self._partial.open("wb")
            self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor) -> None:
        """Append the next tokens; raises NumericsError when an input or a gate is not finite."""
        check_batch(x_TD, index_TK, gate_TK, self._num_experts)
        for name, tensor in (("input", x_TD), ("gate", gate_TK)):
            finite = tensor.isfinite().all(dim=1)
            if not finite.all():
                token = self.num_written + int(finite.logical_not().nonzero()[0])
                raise NumericsError(
                    f"{self._path.name}: the {name} of the experts at calibration token {token} is "
                    "NaN or infinite; check the source weights, or calibrate in float32"
                )
        places = ((self._index_at, index_TK), (self._gate_at, gate_TK), (self._x_at, x_TD))
        with storage_errors(self._path):
            for start, tensor in places:
                self._file.seek(start + self.num_written * tensor.shape[1] * tensor.element_size())
                self._file.write(_bytes(tensor))
        self.num_written += x_TD.shape[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        complete = error is None and self.num_written == self._num_tokens
        try:
            with storage_errors(self._path):
                with self._file:
                    if complete:
                        self._file.flush()
                        os.fsync(self._file.fileno())
                if complete:
                    self._partial.replace(self._path)
                    sync_folder(self._path.parent)
        finally:
            self._partial.unlink(missing_ok=True)
        assert complete or error is not None, f"{self.num_written} of {self._num_tokens} tokens"


def check_batch(
    x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor, num_experts: int
) -> None:
    for name, tensor, dtype in (
        ("x_TD", x_TD, torch.float32),
        ("index_TK", index_TK, torch.int64),
        ("gate_TK", gate_TK, torch.float32),
    ):
        if tensor.dtype != dtype or tensor.dim() != 2:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected a matrix of "
                f"{dtype}"
            )
    if not (x_TD.shape[0] == index_TK.shape[0] and index_TK.shape == gate_TK.shape):
        raise ValueError(
            f"x_TD {tuple(x_TD.shape)}, index_TK {tuple(index_TK.shape)} and gate_TK "
            f"{tuple(gate_TK.shape)} do not agree on tokens and top-k"
        )
    if not 1 <= index_TK.shape[1] <= num_experts:
        raise ValueError(f"top-k is {index_TK.shape[1]} with {num_experts} experts")
    if index_TK.numel() and (int(index_TK.min()) < 0 or int(index_TK.max()) >= num_experts):
        raise ValueError(f"index_TK names an expert outside 0 to {num_experts - 1}")
    ordered = index_TK.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("index_TK names the same expert twice for one token")


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().numpy()
    return memoryview(array).cast("B")
