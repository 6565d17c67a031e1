"""Loads a model through vLLM's own loader without starting an engine: about a second each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_moesvd.latent_runner import LatentRunner


def engine_config(path: Path, **arguments: Any) -> VllmConfig:
    """What `vllm serve PATH` would check and configure before it starts anything."""
    load_general_plugins()
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    return EngineArgs(model=str(path), **(defaults | arguments)).create_engine_config()


def build_model(config: VllmConfig) -> torch.nn.Module:
    """The model with uninitialised weights, as it is before loading."""
    initialize_distributed(config)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config)


def load_model(config: VllmConfig) -> torch.nn.Module:
    """The model with the weights of its checkpoint, ready to run."""
    initialize_distributed(config)
    # vLLM's CPU worker replaces this function too; without an accelerator it raises.
    with (
        set_current_vllm_config(config),
        patch.object(torch.accelerator, "empty_cache", lambda: None),
    ):
        return get_model(vllm_config=config)


@contextmanager
def plain_weights() -> Iterator[None]:
    """Linear layers keep their weights when a model is loaded, as on a GPU."""

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    with patch("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", keep):
        yield


def join_products(model: torch.nn.Module) -> int:
    """Let latent layers multiply x as on a GPU, by the operator; how many layers do.

    The model must have been loaded with `plain_weights`.
    """
    runners = [module for module in model.modules() if isinstance(module, LatentRunner)]
    for runner in runners:
        runner.is_joined = True
    return len(runners)


def run_moe_block(
    model: torch.nn.Module, config: VllmConfig, layer: int, x_TD: torch.Tensor
) -> torch.Tensor:
    """Router and experts of one decoder layer applied to tokens."""
    decoder = model.model.layers[layer]
    block = decoder.block_sparse_moe if hasattr(decoder, "block_sparse_moe") else decoder.mlp
    with set_current_vllm_config(config), set_forward_context(None, config), torch.no_grad():
        return block(x_TD.clone())


def join_processes(config: VllmConfig, *, rank: int, tp_size: int, store: Path) -> None:
    """Make this process number `rank` of a tensor-parallel group that meets at the file `store`."""
    with set_current_vllm_config(config):
        init_distributed_environment(tp_size, rank, f"file://{store}", rank, "gloo")
        ensure_model_parallel_initialized(tp_size, 1)


def initialize_distributed(config: VllmConfig) -> None:
    if not model_parallel_is_initialized():
        join_processes(config, rank=0, tp_size=1, store=Path(tempfile.mkdtemp()) / "store")
