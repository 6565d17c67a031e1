"""Our experts forward against transformers' own, and the modules it must refuse."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from compress_tool.errors import UnsupportedError
from compress_tool.experts import IMPLEMENTATION, check_experts, forward, register_experts
from tests.checkpoints import mixtral_config


def experts_module() -> MixtralExperts:
    config = MixtralConfig.from_dict(mixtral_config())
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
        weight.requires_grad_(False)
    module.moesvd_observer = module.moesvd_bias_D = module.moesvd_dynamic = None
    return module


def routed_batch(tokens: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    gate, index = torch.rand(tokens, 4, generator=generator).topk(2, dim=1)
    return torch.randn(tokens, 64, generator=generator), index, gate / gate.sum(1, keepdim=True)


@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_forward_equals_transformers_eager(tokens):
    module = experts_module()
    batch = routed_batch(tokens)
    torch.testing.assert_close(forward(module, *batch), module(*batch), rtol=0, atol=1e-6)


def test_bias_is_added_once_per_token():
    module = experts_module()
    batch = routed_batch()
    without = forward(module, *batch)
    module.moesvd_bias_D = torch.arange(64.0)
    torch.testing.assert_close(forward(module, *batch), without + torch.arange(64.0))


def test_bfloat16_output_is_summed_in_fp32():
    module = experts_module().to(torch.bfloat16)
    x, index, gate = routed_batch()
    x = x.to(torch.bfloat16)
    gate[:] = 2.0**-9
    gate[:, 0] = 1.0
    y = forward(module, x, index, gate)
    assert y.dtype == torch.bfloat16
    exact = forward(module.float(), x.float(), index, gate)
    assert (y.float() - exact).norm() / exact.norm() < 0.01


def test_the_observer_sees_the_arguments():
    module = experts_module()
    batch = routed_batch()
    seen = []
    module.moesvd_observer = lambda *arguments: seen.append(arguments)
    forward(module, *batch)
    assert len(seen) == 1
    assert all(a is b for a, b in zip(seen[0], batch, strict=True))


def test_registering_twice_is_harmless():
    assert register_experts() == register_experts() == IMPLEMENTATION
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is forward


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("has_gate", False), ("has_bias", True), ("is_transposed", True), ("is_concatenated", False)],
)
def test_experts_of_another_kind_are_refused(attribute, value):
    module = experts_module()
    check_experts(module, "model.layers.0.mlp.experts")
    setattr(module, attribute, value)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.experts"):
        check_experts(module, "model.layers.0.mlp.experts")
