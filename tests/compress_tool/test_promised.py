"""A bare config.json gives the sizes that the weights would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, UnsupportedError
from compress_tool.inspect import describe
from compress_tool.promised import promised_checkpoint
from tests.checkpoints import mixtral_config, tiny_mixtral
from tests.compress_tool.test_checkpoint import narrow_checkpoint


@pytest.mark.parametrize("make", [tiny_mixtral, narrow_checkpoint])
def test_the_promise_is_what_the_weights_are(tmp_path: Path, make):
    root = make(tmp_path / "model")
    real = open_checkpoint(root, allow_factored=True)
    promised = promised_checkpoint(root / "config.json")
    assert {n: (t.shape, t.dtype, t.num_bytes) for n, t in promised.tensors.items()} == {
        n: (t.shape, t.dtype, t.num_bytes) for n, t in real.tensors.items()
    }
    assert describe(promised) == describe(real)


def test_mixtral_8x7b_has_its_published_size(tmp_path: Path):
    """46.7 billion parameters, 12.9 of them active, from the published config's numbers."""
    config = mixtral_config(
        dtype="bfloat16",
        head_dim=None,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        num_local_experts=8,
        vocab_size=32000,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = describe(promised_checkpoint(tmp_path / "config.json"))
    assert said["total_params"] == 46_702_792_704
    assert said["active_params"] == 12_879_925_248
    assert said["bytes"] == 2 * said["total_params"]


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"num_hidden_layers": 10**9}, InputError, "num_hidden_layers"),
        ({"num_local_experts": 10**9}, InputError, "num_local_experts"),
        ({"auto_map": {}}, InputError, "auto_map"),
        ({"architectures": ["X"]}, UnsupportedError, "MixtralForCausalLM"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, change: dict, kind, named: str):
    (tmp_path / "config.json").write_text(json.dumps(mixtral_config(**change)))
    with pytest.raises(kind, match=named):
        promised_checkpoint(tmp_path / "config.json")


def test_no_file_is_bad_input(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        promised_checkpoint(tmp_path / "config.json")
    with pytest.raises(InputError, match="regular file"):
        promised_checkpoint(tmp_path)
