"""The registered model classes, one per family of `vllm_moesvd.format`, made on demand.

`vllm_moesvd.models.MixtralMoESVDForCausalLM` is a subclass of vLLM's own `MixtralForCausalLM`. vLLM
caches what it finds out about a class under the hash of this folder's files.
"""

from __future__ import annotations

from typing import Any

from vllm_moesvd import version_problem
from vllm_moesvd.format import FAMILIES, Family


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if name == family.factored_architecture:
            model_class = _model_class(family)
            globals()[name] = model_class
            return model_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _model_class(family: Family) -> type:
    import vllm
    from vllm.model_executor.models import ModelRegistry

    base = ModelRegistry.models[family.architecture].load_model_cls()
    problem = version_problem(vllm.__version__)
    if problem is None:
        from vllm_moesvd.lora import refuse_other_adapters
        from vllm_moesvd.models.adapter import BiasedHead, FactoredModel

        head = (BiasedHead,) if "lm_head" in family.biases else ()
        bases: tuple[type, ...] = (FactoredModel, *head, base)
        members = {"family": family} | refuse_other_adapters(base)
    else:
        bases, members = (base,), {"__init__": _refusal(problem)}
    return type(family.factored_architecture, bases, members | {"__module__": __name__})


def _refusal(problem: str) -> Any:
    """An `__init__` that raises `problem`, with the parameters by which vLLM knows its models."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        raise RuntimeError(problem)

    return __init__
