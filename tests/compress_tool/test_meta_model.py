"""The model built from a config alone: nothing random, nothing from the folder, clear refusals."""

from __future__ import annotations

import pytest
import torch

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.errors import InputError
from compress_tool.meta_model import meta_model
from tests.checkpoints import tiny_mixtral


def build(checkpoint: Checkpoint):
    return meta_model(checkpoint, torch.float32, torch.device("cpu"))


def test_parameters_have_no_memory_and_rotary_frequencies_are_real(tmp_path):
    checkpoint = open_checkpoint(tiny_mixtral(tmp_path / "model"), allow_factored=False)
    model = build(checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert not model.training


def test_nothing_in_the_folder_is_needed(tmp_path):
    path = tiny_mixtral(tmp_path / "model")
    checkpoint = open_checkpoint(path, allow_factored=False)
    for file in path.iterdir():
        file.unlink()
    assert build(checkpoint).config.num_local_experts == 4


@pytest.mark.parametrize(
    "overrides",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_router_logits": True},
        {"use_cache": True},
        {"experts_implementation": "deepgemm"},
        {"attn_implementation": "flash_attention_2"},
        {"router_jitter_noise": 0.5},
    ],
)
def test_settings_of_another_run_do_not_matter(tmp_path, overrides):
    plain = open_checkpoint(tiny_mixtral(tmp_path / "plain"), allow_factored=False)
    other = open_checkpoint(tiny_mixtral(tmp_path / "other", **overrides), allow_factored=False)
    from compress_tool.streaming import StreamedModel

    ids = torch.arange(20).view(2, 10)
    states = []
    for checkpoint in (plain, other):
        model = StreamedModel(checkpoint)
        hidden = model.run_layer(0, model.embed(ids), 2)
        states.append(model.logits(hidden))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"head_dim": 31}, "even rotary dimension"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"pad_token_id": 999}, "Padding_idx"),
        ({"layer_types": 5}, "TypeError"),
    ],
)
def test_a_config_that_transformers_refuses_is_an_input_error(tmp_path, overrides, message):
    path = tiny_mixtral(tmp_path / "model", **overrides)
    with pytest.raises(InputError, match=f"config\\.json.*{message}") as error:
        build(open_checkpoint(path, allow_factored=False))
    assert "\n" not in str(error.value)
