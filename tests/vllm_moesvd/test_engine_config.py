"""What vLLM is told before an engine starts: refusals for ours, nothing for dense models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoints import tiny_mixtral
from tests.families import BY_NAME
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.hand_made import ODD_LAYERS, hand_made
from vllm_moesvd import engine_config
from vllm_moesvd.engine_config import READER_PACKAGES, replicate_option


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_made(ODD_LAYERS, exact=False).write(tmp_path_factory.mktemp("made") / "odd")


def with_config(folder: Path, path: Path, **changes: Any) -> Path:
    """The same weights under a changed config.json."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | changes
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "model_impl",
    # vLLM inspects the class of the third in a process of its own, about 20 s.
    ["auto", "vllm", pytest.param("transformers", marks=pytest.mark.slow)],
)
def test_an_architecture_renamed_back_is_refused(
    model_impl: str, folder: Path, tmp_path: Path
) -> None:
    renamed = with_config(folder, tmp_path / "renamed", architectures=["MixtralForCausalLM"])
    with pytest.raises(ValueError, match=r"would be served as .*MixtralMoESVDForCausalLM"):
        harness.engine_config(renamed, model_impl=model_impl)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MixtralModel", "MixtralForSequenceClassification"])
def test_names_that_vllm_takes_for_the_dense_one_are_refused(
    name: str, folder: Path, tmp_path: Path
) -> None:
    renamed = with_config(folder, tmp_path / "renamed", architectures=[name])
    with pytest.raises(ValueError, match="has the key moesvd"):
        harness.engine_config(renamed)


def test_an_architecture_overridden_on_the_command_line_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has the key moesvd"):
        harness.engine_config(folder, hf_overrides={"architectures": ["MixtralForCausalLM"]})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "moesvd: expected an object, found None"),
        ({}, "format_version is None, this version reads 1"),
        ({"format_version": 2, "layers": {}}, "format_version is 2, this version reads 1"),
        ({"format_version": 1, "layers": {}}, "layers must be a non-empty object"),
        (
            {"format_version": 1, "layers": {"1": {"form": "lora"}}},
            "form is 'lora', expected latent, narrow, shared-v, svd or base-delta",
        ),
        (
            {"format_version": 1, "layers": {"1": {"form": "narrow", "width": 97}}},
            "width is 97, the largest possible is 96",
        ),
        (
            {"format_version": 1, "layers": {"6": {"form": "narrow", "width": 9}}},
            "moesvd.*6",
        ),
    ],
)
def test_a_broken_entry_in_the_config_is_named(
    entry: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        harness.engine_config(with_config(folder, tmp_path / "broken", moesvd=entry))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_ep_weight_filter": True}, "--enable-ep-weight-filter is not supported"),
        ({"data_parallel_size": 2}, "--data-parallel-size above 1 is not supported"),
        ({"enable_lora": True, "lora_target_modules": ["qkv_proj", "experts"]}, "modules experts"),
        ({"enable_lora": True, "enable_moe_shared_loras": True}, "--enable-moe-shared-loras"),
        ({"pipeline_parallel_size": 2}, "leave --enforce-eager out"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 8}, "has 4 experts per layer"),
        ({"load_format": "pt"}, "--load-format pt is not supported"),
        ({"load_format": "sharded_state"}, "--load-format sharded_state is not supported"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, r"quantization \(fp8"),
        ({"additional_config": {"moesvd": {"replicat": True}}}, "the only option is"),
        ({"additional_config": {"moesvd": {"replicate": 1}}}, "must be true or false, found 1"),
        ({"hf_overrides": {"hidden_act": "gelu"}}, "hidden_act gelu is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(
    arguments: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        harness.engine_config(folder, **arguments)


@pytest.mark.parametrize("load_format", READER_PACKAGES)
def test_a_load_format_without_its_reader_is_refused(
    load_format: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"needs the package {READER_PACKAGES[load_format]}, "):
        harness.engine_config(folder, load_format=load_format)
    monkeypatch.setattr(engine_config, "find_spec", lambda name: name)
    harness.engine_config(folder, load_format=load_format)


def test_what_vllm_itself_refuses_on_a_cpu(folder: Path) -> None:
    """Before ours: these lines are vLLM's own, and the same for a dense model."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("a GPU has both")
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        harness.engine_config(folder, enable_sleep_mode=True)
    parallel = {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    with pytest.raises(ValueError, match="load balancing is only supported on CUDA"):
        harness.engine_config(folder, enable_eplb=True, **parallel)


def test_replication_is_an_option_that_the_compile_cache_sees(folder: Path) -> None:
    default = harness.engine_config(folder)
    asked = harness.engine_config(folder, additional_config={"moesvd": {"replicate": True}})
    assert replicate_option(default) is False
    assert replicate_option(asked) is True
    assert default.compute_hash() != asked.compute_hash()


def test_one_changed_rank_is_another_entry_of_the_compile_cache(tmp_path: Path) -> None:
    hashes = set()
    for rank in (17, 18):
        layers = dict(ODD_LAYERS)
        layers[4] = type(layers[4])(
            rank_gate_up=rank, rank_down=23, expert_slot=(0, 1, 1, 2), slot_group=(0, 0, 0)
        )
        path = hand_made(layers, exact=False).write(tmp_path / str(rank))
        hashes.add(harness.engine_config(path).compute_hash())
    assert len(hashes) == 2


def test_a_dense_model_is_configured_as_without_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    path = tiny_mixtral(tmp_path / "dense")
    with_plugin = harness.engine_config(path)
    for name in list(MODELS_CONFIG_MAP):
        if "Mixtral" in name or name.startswith("Transformers"):
            monkeypatch.delitem(MODELS_CONFIG_MAP, name)
    without = harness.engine_config(path)
    assert with_plugin.compute_hash() == without.compute_hash()
    assert with_plugin.model_config.architecture == without.model_config.architecture
    assert with_plugin.model_config.hf_config.to_dict() == without.model_config.hf_config.to_dict()


def test_an_entry_of_vllm_for_the_same_architecture_still_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_moesvd.engine_config import install

    called: list[str] = []

    class Stock:
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            called.append("model")

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            called.append("config")

    monkeypatch.setitem(MODELS_CONFIG_MAP, "MixtralForCausalLM", Stock)
    install()
    entry: Any = MODELS_CONFIG_MAP["MixtralForCausalLM"]
    assert entry is not Stock
    install()
    assert MODELS_CONFIG_MAP["MixtralForCausalLM"] is entry

    model_config = SimpleNamespace(hf_config=SimpleNamespace())
    entry.verify_and_update_model_config(model_config)
    entry.verify_and_update_config(SimpleNamespace(model_config=model_config))
    assert called == ["model", "config"]


def test_a_variant_of_a_family_that_was_not_tested_is_refused(tmp_path: Path) -> None:
    """OLMoE's routing in vLLM does not look at norm_topk_prob."""
    sizes = {"num_experts": 4, "intermediate_size": 96, "num_experts_per_tok": 2}
    made = hand_made(ODD_LAYERS, exact=False, family=BY_NAME["olmoe"], **sizes)
    folder = made.write(tmp_path / "made")
    harness.engine_config(folder)
    with pytest.raises(ValueError, match="norm_topk_prob is True; of OlmoeForCausalLM only False"):
        harness.engine_config(with_config(folder, tmp_path / "changed", norm_topk_prob=True))
