"""The header of one safetensors file, read strictly and without touching the weights.

A safetensors file is `u64 little-endian N | N bytes of JSON | payload`. The JSON maps a tensor
name to `{"dtype", "shape", "data_offsets"}`, offsets counted from the start of the payload. The
library's own reader lets through duplicate keys, empty tensors and names with control characters
or `..`; this one refuses them, and its messages name the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compress_tool.errors import InputError, TemporaryError

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
"""The library's own limit; a longer header cannot be loaded by any consumer."""
MAX_NAME_CHARS: Final = 512
DTYPE_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `file[start:end]` holds `shape` numbers of `dtype`, row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class JsonError(ValueError):
    """Text that is not one JSON value with unique keys."""


def strict_json(data: bytes) -> Any:
    """Parse JSON; duplicate keys, NaN, bad UTF-8 and bottomless nesting raise JsonError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise JsonError(f"the key {show(key)} appears twice")
            result[key] = value
        return result

    def no_constant(name: str) -> Any:
        raise JsonError(f"{name} is not a JSON number")

    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant
        )
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at character {error.pos}") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file in payload order; reads the header only.

    Raises InputError, naming file and tensor, unless every byte of the file is accounted for.
    """
    header_bytes, file_bytes = _read_header_bytes(file)
    try:
        header = strict_json(header_bytes)
    except JsonError as error:
        raise InputError(f"{file}: header is not valid JSON: {error}; download it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: header must be a JSON object, found {show(header)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{file}: __metadata__ must map strings to strings")
    payload_start = LENGTH_BYTES + len(header_bytes)
    tensors = [_tensor_info(file, name, entry, payload_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.start)
    position = payload_start
    for tensor in tensors:
        if tensor.start != position:
            raise InputError(
                f"{file}: tensor {tensor.name} starts at payload byte "
                f"{tensor.start - payload_start}, expected {position - payload_start} "
                "(tensors must lie one after the other)"
            )
        position = tensor.end
    if position != file_bytes:
        problem = "truncated" if position > file_bytes else "longer than its header says"
        raise InputError(
            f"{file}: file is {problem}: {file_bytes} bytes, the header accounts for {position}; "
            "download it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def header_bytes_of(file: Path) -> bytes:
    """The raw header of an already audited file: length prefix and JSON."""
    header, _ = _read_header_bytes(file)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def show(value: Any) -> str:
    """A value as it may appear in a one-line message: printable and short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_header_bytes(file: Path) -> tuple[bytes, int]:
    try:
        # O_NONBLOCK: opening a FIFO that someone named model.safetensors must not hang.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{file}: not a regular file, expected a safetensors file")
            prefix = stream.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                raise InputError(
                    f"{file}: {len(prefix)} bytes long, too short for a safetensors file"
                )
            length = int.from_bytes(prefix, "little")
            available = status.st_size - LENGTH_BYTES
            if length < 2 or length > min(MAX_HEADER_BYTES, available):
                raise InputError(
                    f"{file}: header length is {length} bytes, expected 2 to "
                    f"{min(MAX_HEADER_BYTES, available)}; the file is truncated or not safetensors"
                )
            header = stream.read(length)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise TemporaryError(f"{file}: reading failed: {error.strerror}; try again") from error
    if len(header) != length:
        raise InputError(f"{file}: header ends after {len(header)} of {length} bytes")
    return header, status.st_size


def _tensor_info(file: Path, name: str, entry: Any, payload_start: int) -> TensorInfo:
    where = f"{file}: tensor {show(name)}"
    if not _SAFE_NAME.fullmatch(name) or ".." in name or len(name) > MAX_NAME_CHARS:
        raise InputError(f"{where}: a name may hold letters, digits, '_', '-' and single '.' only")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected dtype, shape and data_offsets, found {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where}: unknown dtype {show(dtype)}")
    if not isinstance(shape, list) or any(type(size) is not int or size < 1 for size in shape):
        raise InputError(f"{where}: shape must be positive integers, found {show(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int or offset < 0 for offset in offsets)
    ):
        raise InputError(f"{where}: data_offsets must be two integers ≥ 0, found {show(offsets)}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise InputError(
            f"{where}: data_offsets {show(offsets)} span {offsets[1] - offsets[0]} bytes, shape "
            f"{show(shape)} of {dtype} needs {show(expected)}"
        )
    return TensorInfo(
        name=name,
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        start=payload_start + offsets[0],
        end=payload_start + offsets[1],
    )
