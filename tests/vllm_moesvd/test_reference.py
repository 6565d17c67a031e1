"""The reference agrees with dense experts whose weights are the products of the factors."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_moesvd.closeness import are_close
from tests.vllm_moesvd.hand_made import EXACT_LAYERS, MIXTRAL, ODD_LAYERS, hand_made
from tests.vllm_moesvd.layer_math import dense_layer, layer_output, routing

CASES = [("odd", layer) for layer in ODD_LAYERS] + [("exact", layer) for layer in EXACT_LAYERS]


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_every_form_equals_its_dense_product(kind: str, layer: int) -> None:
    layers = ODD_LAYERS if kind == "odd" else EXACT_LAYERS
    made = hand_made(layers, exact=kind == "exact")
    x_TD, index_TK, gate_TK = routing(tokens=23)
    expected = dense_layer(made.dense_tensors, layer, x_TD, index_TK, gate_TK)
    if layer in made.bias:
        expected = expected + made.bias[layer]
    actual = layer_output(made, layers[layer], layer, x_TD, index_TK, gate_TK)
    assert are_close(actual, expected)


def test_wrong_outputs_are_far_away() -> None:
    """The null tests of the tolerance: zeros, swapped experts, a dropped token."""
    made = hand_made(ODD_LAYERS, exact=False)
    x_TD, index_TK, gate_TK = routing(tokens=23)
    right = layer_output(made, ODD_LAYERS[3], 3, x_TD, index_TK, gate_TK)
    assert are_close(right, right)
    assert not are_close(torch.zeros_like(right), right)
    swapped = layer_output(made, ODD_LAYERS[3], 3, x_TD, index_TK.flip(1), gate_TK)
    assert not are_close(swapped, right)
    dropped = right.clone()
    dropped[-1] = 0
    assert not are_close(dropped, right)


def test_the_bias_is_added_once_per_token() -> None:
    made = hand_made(ODD_LAYERS, exact=False)
    x_TD, index_TK, gate_TK = routing(tokens=5)
    with_bias = layer_output(made, ODD_LAYERS[1], 1, x_TD, index_TK, gate_TK)
    prefix = MIXTRAL.experts_prefix.format(layer=1)
    made.tensors[f"{prefix}.moesvd.bias_down"] = torch.zeros(64)
    without = layer_output(made, ODD_LAYERS[1], 1, x_TD, index_TK, gate_TK)
    assert torch.allclose(with_bias - without, made.bias[1].expand(5, -1), atol=1e-5)
