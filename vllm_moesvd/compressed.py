"""Checkpoints whose dense linear layers compressed-tensors has quantised, beside factored experts.

Routed experts, routers and lm_head must be in the `ignore` list of `quantization_config`; what is
left is attention and, where a model has them, shared experts and dense layers. vLLM quantises
activations itself, so each quantised weight comes with its scale and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch

from vllm_moesvd.format import PROJECTIONS, Family

METHOD: Final = "compressed-tensors"
FORMATS: Final = {
    ("int-quantized", "int"): torch.int8,
    ("float-quantized", "float"): torch.float8_e4m3fn,
}
"""What a weight is stored as, by `format` and by the type of the weights: one byte each."""


def scheme_problem(family: Family, moe_layers: tuple[int, ...], config: Any) -> str | None:
    """Why the `quantization_config` of a loaded config is not one of those above, in one line."""
    from vllm.platforms import current_platform

    given = config.quantization_config
    groups = list(given.get("config_groups", {}).values())
    if len(groups) != 1 or list(groups[0].get("targets", [])) != ["Linear"]:
        return _line("has other config_groups than one with targets Linear")
    weights = groups[0].get("weights") or {}
    if _dtype(given) is None or weights.get("num_bits") != 8 or not weights.get("symmetric"):
        return _line("must be int-quantized or float-quantized with symmetric weights of 8 bits")
    if _dtype(given) != torch.int8 and current_platform.is_cpu():
        return _line("is float-quantized, for which vLLM 0.32 has no product on a CPU")
    if weights.get("strategy") not in ("channel", "tensor"):
        return _line(f"has strategy {weights.get('strategy')!r}, expected channel or tensor")
    activations = groups[0].get("input_activations")
    if activations is not None and not activations.get("dynamic"):
        return _line("has static input_activations, expected dynamic ones or none")
    if given.get("kv_cache_scheme") is not None:
        return _line("has a kv_cache_scheme, expected none")
    needed = [f"{family.router_name.format(layer=i)}".removesuffix(".weight") for i in moe_layers]
    needed += [
        family.expert_tensor(i, 0, projection).removesuffix(".weight")
        for i in moe_layers
        for projection in PROJECTIONS
    ]
    kept = [name for name in [*needed, "lm_head"] if not _is_ignored(name, given)]
    if kept:
        return _line(f"quantises {kept[0]}; routed experts, routers and lm_head must be in ignore")
    return None


def quantised_weights(
    config: Any, dense: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, torch.dtype], dict[str, tuple[int, ...]]]:
    """Of the tensors `dense` (name → shape): the quantised ones' types, and the scales beside them.

    Both are empty for a config without `quantization_config`.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return {}, {}
    (group,) = given["config_groups"].values()
    dtype = _dtype(given)
    assert dtype is not None, "scheme_problem was not asked"
    by_channel = group["weights"]["strategy"] == "channel"
    dtypes: dict[str, torch.dtype] = {}
    scales: dict[str, tuple[int, ...]] = {}
    for name, shape in dense.items():
        module = name.removesuffix(".weight")
        is_linear = len(shape) == 2 and module != name and not module.endswith("embed_tokens")
        if is_linear and not _is_ignored(module, given):
            dtypes[name] = dtype
            scales[f"{name}_scale"] = (shape[0], 1) if by_channel else (1,)
    return dtypes, scales


def _dtype(given: Mapping[str, Any]) -> torch.dtype | None:
    (group,) = given["config_groups"].values()
    return FORMATS.get((str(given.get("format")), str((group.get("weights") or {}).get("type"))))


def _is_ignored(module: str, given: Mapping[str, Any]) -> bool:
    """compressed-tensors' rule: the name itself, or `re:` and a pattern for its beginning."""
    return any(
        re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module
        for entry in given.get("ignore") or ()
    )


def _line(problem: str) -> str:
    return (
        f"moesvd: quantization_config of config.json {problem}; with factored experts only dense "
        "linear layers may be quantised"
    )
