"""Checks that vLLM runs in its first process, before any weight is read or engine started.

vLLM asks `MODELS_CONFIG_MAP[architecture]` to verify each configuration. For a factored
architecture the entry checks config.json and refuses what is not supported. For every dense
architecture that could be given a factored checkpoint by mistake, the entry refuses a config.json
that has the `moesvd` key; a dense config.json passes through unchanged.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

from vllm_moesvd.audit import audit_folder
from vllm_moesvd.compressed import METHOD, scheme_problem
from vllm_moesvd.format import CONFIG_KEY, FAMILIES, Family
from vllm_moesvd.loading import ModelPlan, read_plan
from vllm_moesvd.lora import limit_to_attention

TRANSFORMERS_BACKENDS: Final = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
"""What a dense architecture becomes with `--model-impl transformers`."""
LOAD_FORMATS: Final = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "dummy",
)
"""The formats whose tensors pass through `load_weights`; all read safetensors."""
READER_PACKAGES: Final = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "runai_streamer": "runai_model_streamer",
}
"""Formats whose reader is a package of its own: without it vLLM fails with a traceback."""
FOLDER_FORMATS: Final = ("auto", "hf", "safetensors")
MARK: Final = "_moesvd"


def install() -> None:
    """Add our entries to vLLM's map; a second call changes nothing."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        dense_entry = MODELS_CONFIG_MAP.get(family.architecture)
        MODELS_CONFIG_MAP.setdefault(
            family.factored_architecture, _factored_entry(family, dense_entry)
        )
    for name in (*(family.architecture for family in FAMILIES), *TRANSFORMERS_BACKENDS):
        entry = MODELS_CONFIG_MAP.get(name)
        if not hasattr(entry, MARK):
            MODELS_CONFIG_MAP[name] = _dense_entry(entry)


def replicate_option(vllm_config: Any) -> bool:
    """`--additional-config '{"moesvd": {"replicate": true}}'`: whole V and Q in every process.

    Trades memory for two fewer exchanges per layer under tensor parallelism; off by default.
    """
    additional = vllm_config.additional_config
    options = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    if not isinstance(options, dict) or not set(options) <= {"replicate"}:
        raise ValueError(
            f"moesvd: --additional-config {CONFIG_KEY} is {options!r}, the only option is "
            '{"replicate": true}'
        )
    replicate = options.get("replicate", False)
    if not isinstance(replicate, bool):
        raise ValueError(f"moesvd: replicate must be true or false, found {replicate!r}")
    return replicate


def unsupported_feature(vllm_config: Any) -> str | None:
    """The first requested feature that factored layers have not been taught, in one line.

    Also limits LoRA to attention, which is as much of it as they have been taught.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    load_format = vllm_config.load_config.load_format
    hidden_act = getattr(model.hf_config, "hidden_act", "silu")
    refused = {
        "--enable-ep-weight-filter": parallel.enable_ep_weight_filter,
        "--enable-eplb": parallel.enable_eplb,
        "--enable-elastic-ep": parallel.enable_elastic_ep,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel.prefill_context_parallel_size > 1,
        f"quantization ({model.quantization})": model.quantization not in (None, METHOD),
        f"--load-format {load_format}": load_format not in LOAD_FORMATS,
        f"hidden_act {hidden_act}": hidden_act != "silu",
    }
    for feature, is_requested in refused.items():
        if is_requested:
            return f"moesvd: {feature} is not supported for factored checkpoints; leave it out"
    package = READER_PACKAGES.get(load_format)
    if package is not None and find_spec(package) is None:
        return (
            f"moesvd: --load-format {load_format} needs the package {package}, which is not "
            "installed; install it or leave the option out"
        )
    if vllm_config.lora_config is not None:
        return limit_to_attention(vllm_config.lora_config)
    return _eager_pipeline_on_cpu(vllm_config)


def _too_few_experts(vllm_config: Any, plan: ModelPlan) -> str | None:
    """With expert parallelism each process needs an expert of its own."""
    parallel, experts = vllm_config.parallel_config, plan.shape.num_experts
    if parallel.enable_expert_parallel and parallel.tensor_parallel_size > experts:
        return (
            f"moesvd: --enable-expert-parallel with {parallel.tensor_parallel_size} processes: the "
            f"model has {experts} experts per layer; leave the option out or use fewer processes"
        )
    return None


def _eager_pipeline_on_cpu(vllm_config: Any) -> str | None:
    """vLLM 0.32 makes a stage's input buffer in its warm-up, which an eager CPU engine skips."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    is_eager = vllm_config.model_config.enforce_eager
    if parallel.pipeline_parallel_size > 1 and is_eager and current_platform.is_cpu():
        return (
            "moesvd: --pipeline-parallel-size above 1 with --enforce-eager does not run on a CPU "
            "in vLLM 0.32, dense or factored; leave --enforce-eager out"
        )
    return None


def _avoid_wrong_rotation(family: Family, vllm_config: Any) -> None:
    """Keep vLLM's CPU operator off the interleaved rotary embedding of latent attention.

    In vLLM 0.32 `rotary_embedding` with `is_neox_style=False` gives wrong queries on a CPU where
    they have more heads than the keys; its torch code is right (docs/log.md).
    """
    from vllm.platforms import current_platform

    operators = vllm_config.compilation_config.custom_ops
    is_hit = family.attention == "latent" and current_platform.is_cpu()
    if is_hit and not {"+rotary_embedding", "-rotary_embedding"} & set(operators):
        operators.append("-rotary_embedding")


def _factored_entry(family: Family, dense_entry: Any) -> type:
    class FactoredConfig:
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            read_plan(family, model_config.hf_config)
            if dense_entry is not None:
                dense_entry.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            model_config = vllm_config.model_config
            plan = read_plan(family, model_config.hf_config)
            problem = unsupported_feature(vllm_config) or _too_few_experts(vllm_config, plan)
            if problem is None and model_config.quantization == METHOD:
                problem = scheme_problem(family, plan.moe_layers, model_config.hf_config)
            if problem:
                raise ValueError(problem)
            replicate_option(vllm_config)
            _avoid_wrong_rotation(family, vllm_config)
            if vllm_config.load_config.load_format in FOLDER_FORMATS:
                audit_folder(model_config.model, family, model_config.hf_config)
            if dense_entry is not None:
                dense_entry.verify_and_update_config(vllm_config)

    return FactoredConfig


def _dense_entry(entry: Any) -> type:
    class DenseConfig:
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            _refuse_factored(model_config)
            if entry is not None:
                entry.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            # vLLM asks here, and only here, for names such as MixtralModel.
            _refuse_factored(vllm_config.model_config)
            if entry is not None:
                entry.verify_and_update_config(vllm_config)

    setattr(DenseConfig, MARK, True)
    return DenseConfig


def _refuse_factored(model_config: Any) -> None:
    if getattr(model_config.hf_config, CONFIG_KEY, None) is None:
        return
    known = ", ".join(family.factored_architecture for family in FAMILIES)
    raise ValueError(
        f"moesvd: {model_config.model}: config.json has the key {CONFIG_KEY}, so its layers are "
        f"factored, but would be served as {model_config.architecture}, which reads dense layers; "
        f"architectures in config.json must name the factored one ({known})"
    )
