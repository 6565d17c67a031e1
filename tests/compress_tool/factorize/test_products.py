"""Products by oneDNN and by halves give what plain fp64 gives."""

from __future__ import annotations

import pytest
import torch

from compress_tool.factorize import products


@pytest.mark.parametrize("smallest", [0, 2**60])
def test_products_equal_fp64(smallest, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST_PRODUCT", smallest)
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 33, generator=g), torch.randn(41, 33, generator=g)
    exact = left.double() @ right.double().T
    assert (products.product(left, right) - exact).norm() < 1e-6 * exact.norm()
    for other in (left, left.clone() * 2):
        exact = left.double().T @ other.double()
        assert (products.inner(left, other) - exact).norm() < 1e-6 * exact.norm()
    exact = left.double().T @ left.double()
    assert torch.equal(products.inner(left, left), products.inner(left, left).T)
    assert (products.moment(left) - exact).norm() < 1e-6 * exact.norm()


def test_a_wide_spectrum_gets_fp64_eigenvectors():
    """The last of four eigenvalues is 1e-9 of the first: below what fp32 can see."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    values = torch.tensor([1.0, 1e-3, 1e-6, 1e-9] + [1e-13] * 8, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    spectrum, vectors = products.leading(matrix, 4, torch.float32)
    assert torch.allclose(spectrum[:4], values[:4], rtol=1e-3)
    assert torch.allclose((basis[:, :4].T @ vectors).abs(), torch.eye(4).double(), atol=1e-3)
