"""Products of tall fp32 matrices on a CPU, and leading eigenvectors: the time of a solver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn.functional import conv2d, linear, pad

from compress_tool.factorize.whitening import symmetric_eigen

SMALLEST_PRODUCT: Final = 2**24
"""Multiplications below which setting up oneDNN costs more than it gains."""

IMAGES: Final = 16
"""torch gives a 1 x 1 convolution to oneDNN from this many images on; fewer become a matmul."""

ROWS_OF_IMAGES: Final = 1024
"""Fewer rows make images too small for oneDNN's convolution."""

PRECISE_SIZE: Final = 512
"""Up to this size fp64 products cost nothing that matters."""

CHUNK_ROWS: Final = 4096
"""Tokens multiplied at once; fp32 sums stay this short before they enter an fp64 sum."""

SINGLE_RANGE: Final = 1e-5
"""fp32 eigenvectors are used while the last one that is kept has at least this share of the
largest eigenvalue: their error is some 1e-7 of the largest."""


def product(left_nk: torch.Tensor, right_mk: torch.Tensor) -> torch.Tensor:
    """left rightᵀ in the inputs' dtype; see `products`."""
    return products(left_nk, (right_mk,))[0]


def products(left_nk: torch.Tensor, rights_mk: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """left rightᵀ for several right sides, in the inputs' dtype.

    fp32 on a CPU goes through oneDNN: MKL uses half of the vector width on AMD processors
    (93 against 205 Gflop/s on one Zen 5 core at 2048 x 2048 x 768).
    """
    size = left_nk.numel() * min(len(right_mk) for right_mk in rights_mk)
    if (
        left_nk.dtype == torch.float32
        and left_nk.device.type == "cpu"
        and size >= SMALLEST_PRODUCT
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ):
        return _through_onednn(left_nk, rights_mk)
    return [left_nk @ right_mk.T for right_mk in rights_mk]


def _through_onednn(left_nk: torch.Tensor, rights_mk: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same, of fp32 on a CPU.

    `linear` on oneDNN's own tensors copies its input and its output, which takes a third of the
    time where they are large (104 against 70 ms at 2048 x 1024 x 3584). A 1 x 1 convolution over
    channels-last images takes ordinary memory, and is slower than `linear` on few rows.
    """
    rows, size = left_nk.shape
    if rows < ROWS_OF_IMAGES:
        blocked = left_nk.to_mkldnn()
        return [linear(blocked, right_mk).to_dense() for right_mk in rights_mk]
    if rows % IMAGES:
        left_nk = pad(left_nk, (0, 0, 0, -rows % IMAGES))
    images = left_nk.reshape(IMAGES, -1, 1, size).permute(0, 3, 1, 2)
    found = [conv2d(images, right_mk[:, :, None, None]) for right_mk in rights_mk]
    return [y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])[:rows] for y in found]


def inner(left_na: torch.Tensor, right_nb: torch.Tensor) -> torch.Tensor:
    """leftᵀ right in fp64, of one chunk of rows: its caller sums chunks, here nothing is summed."""
    left_an = left_na.T.contiguous()
    if right_nb is not left_na:
        return product(left_an, right_nb.T.contiguous()).double()
    # A Gram is symmetric: of its four quarters three are computed.
    half = len(left_an) // 2
    if half * left_an.numel() < SMALLEST_PRODUCT:
        return (left_an @ left_an.T).double()
    first, second = left_an[:half], left_an[half:]
    corner, side = products(first, (first, second))
    total = torch.empty(len(left_an), len(left_an), dtype=torch.float64, device=left_an.device)
    total[:half, :half] = corner
    total[:half, half:] = side
    total[half:, :half] = side.T
    total[half:, half:] = product(second, second)
    return total


def moment(rows_nD: torch.Tensor) -> torch.Tensor:
    """Σ_n row rowᵀ, fp64 [D, D]; products in fp64 up to PRECISE_SIZE, else in fp32 chunks."""
    dtype = product_dtype(rows_nD.shape[1])
    total_DD = rows_nD.new_zeros(rows_nD.shape[1], rows_nD.shape[1], dtype=torch.float64)
    for chunk_cD in torch.split(rows_nD, CHUNK_ROWS):
        chunk_cD = chunk_cD.to(dtype)
        total_DD += inner(chunk_cD, chunk_cD)
    return total_DD


def product_dtype(size: int) -> torch.dtype:
    """In which dtype to multiply matrices whose inner or larger side is `size`."""
    return torch.float64 if size <= PRECISE_SIZE else torch.float32


def leading(matrix_mm: torch.Tensor, rank: int, dtype: torch.dtype) -> _Leading:
    """Spectrum, largest first, and the first `rank` eigenvectors as columns, both fp64.

    `dtype` is that of the products behind the matrix: fp32 products deserve fp32 eigenvectors,
    at half the time, as long as SINGLE_RANGE allows.
    """
    if dtype == torch.float32:
        values, vectors_mm = symmetric_eigen(matrix_mm.float())
        if values[min(rank, len(values)) - 1] >= SINGLE_RANGE * values[0]:
            return values.double(), vectors_mm[:, :rank].double()
    values, vectors_mm = symmetric_eigen(matrix_mm.double())
    return values, vectors_mm[:, :rank]


_Leading = tuple[torch.Tensor, torch.Tensor]
