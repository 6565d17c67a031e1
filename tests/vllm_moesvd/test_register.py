"""`register()`: what vLLM calls in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vllm_moesvd
from vllm_moesvd import version_problem
from vllm_moesvd.format import FAMILIES

pytest.importorskip("vllm")

NAMES = [family.factored_architecture for family in FAMILIES]


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_moesvd, vllm_moesvd.format;"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.1.dev3+g1234"])
def test_the_supported_versions(version: str) -> None:
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "1.32.0", "dev", ""])
def test_other_versions_are_named_in_one_line(version: str) -> None:
    problem = version_problem(version)
    assert problem is not None
    assert "\n" not in problem
    assert ">=0.32,<0.33" in problem
    assert version in problem


def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    vllm_moesvd.register()
    registered = dict(ModelRegistry.models)
    entries = dict(MODELS_CONFIG_MAP)
    vllm_moesvd.register()
    assert ModelRegistry.models == registered
    assert entries == MODELS_CONFIG_MAP
    assert set(NAMES) <= set(registered)


def test_dense_architectures_keep_the_class_of_vllm() -> None:
    from vllm.model_executor.models import ModelRegistry

    before = {family.architecture: ModelRegistry.models[family.architecture] for family in FAMILIES}
    vllm_moesvd.register()
    for name, entry in before.items():
        assert ModelRegistry.models[name] is entry
        assert entry.load_model_cls().__module__.startswith("vllm.")


def test_a_factored_class_is_a_subclass_with_the_same_interfaces() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.registry import _ModelInfo

    vllm_moesvd.register()
    for family in FAMILIES:
        dense = ModelRegistry.models[family.architecture].load_model_cls()
        factored = ModelRegistry.models[family.factored_architecture].load_model_cls()
        assert issubclass(factored, dense)
        assert factored.__name__ == family.factored_architecture
        described = _ModelInfo.from_model_cls(factored), _ModelInfo.from_model_cls(dense)
        assert described[0] == _replaced(described[1], architecture=factored.__name__)


def test_another_vllm_refuses_factored_checkpoints_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class still exists, so the reason reaches the user instead of "not supported"."""
    import vllm

    from vllm_moesvd import models

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    for name in NAMES:
        monkeypatch.delitem(vars(models), name, raising=False)
        refusing = getattr(models, name)
        monkeypatch.delitem(vars(models), name)
        with pytest.raises(RuntimeError, match=r"supports vLLM >=0\.32,<0\.33 and found vLLM"):
            refusing(vllm_config=None, prefix="")
    vllm_moesvd.register()


def test_unknown_names_are_not_models() -> None:
    from vllm_moesvd import models

    with pytest.raises(AttributeError, match="LlamaMoESVDForCausalLM"):
        models.LlamaMoESVDForCausalLM  # noqa: B018


def _replaced(info: object, **changes: object) -> object:
    import dataclasses

    return dataclasses.replace(info, **changes)  # type: ignore[type-var]
