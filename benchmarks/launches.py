"""Launches and collectives of one MoE block in every form, counted while vLLM's own block runs.

    python -m benchmarks.launches

Each process builds two models with random weights on a CPU and says that a GPU is there. Then
- operators of torch are counted as they are dispatched; views and allocations launch nothing;
- kernels of this project are counted where they would be launched, and not run;
- vLLM's fused experts and its router are counted as calls, because on a GPU they are other code;
- collectives are counted as they reach torch.distributed, among real processes.
Copies are operators that only move numbers. Nothing is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_moesvd.format import (
    CONFIG_KEY,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    spec_to_json,
)
from vllm_moesvd.joined import joined_linear

MODES: Final = {"1": (1, False), "2": (2, False), "2, replicate": (2, True)}
"""Processes, and whether they have V gate, V up and U down, or V and Q, whole."""
BATCHES: Final = (1, 64)
HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 512, 8, 2
LATENT: Final = LatentSpec(rank_gate_up=128, rank_down=128, width=WIDTH)
OWN_SLOTS: Final = tuple(range(EXPERTS))
RANKS: Final[dict[str, Any]] = {"rank_gate_up": 128, "rank_down": 128, "expert_slot": OWN_SLOTS}
Forms = dict[str, LayerSpec | None]
MIXTRAL: Final[Forms] = {
    "dense": None,
    "narrow": NarrowSpec(width=256),
    "latent": LATENT,
    "shared-v": FactoredSpec(**RANKS, slot_group=(0,) * EXPERTS),
    "svd": FactoredSpec(**RANKS, slot_group=OWN_SLOTS, form="svd"),
    "base-delta": FactoredSpec(
        **RANKS, slot_group=(0,) * EXPERTS, base_width=WIDTH, form="base-delta"
    ),
}
"""Mixtral's blocks, small: what is launched at these batches does not depend on the sizes, except
that V's products are split (and so summed) where they would leave a GPU idle: up to two more."""
QWEN2: Final[Forms] = {"dense, shared expert": None, "latent, shared expert": LATENT}
"""Qwen2-MoE's blocks: beside the routed experts one for all tokens, with a gate of its own."""
COMMON: Final[dict[str, Any]] = {
    "hidden_size": HIDDEN,
    "num_experts_per_tok": TOP_K,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 128,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MODELS: Final[dict[str, tuple[Forms, dict[str, Any]]]] = {
    "mixtral": (
        MIXTRAL,
        {
            "architectures": ["MixtralMoESVDForCausalLM"],
            "intermediate_size": WIDTH,
            "num_local_experts": EXPERTS,
            "head_dim": 128,
        },
    ),
    "qwen2_moe": (
        QWEN2,
        {
            "architectures": ["Qwen2MoeMoESVDForCausalLM"],
            "intermediate_size": WIDTH,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": WIDTH,
            "num_experts": EXPERTS,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}
"""By `model_type`: the forms of its layers, in this order, and what its config.json adds."""
LAYERS: Final = MIXTRAL | QWEN2
NO_LAUNCH: Final = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")
COPIES: Final = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.cat")
COLLECTIVES: Final = {
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
}
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


class Dispatched(TorchDispatchMode):
    """Counts operators that would launch something, by kind, and collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.is_paused = False

    @contextmanager
    def without_gloo(self) -> Iterator[None]:
        """gloo scatters with operators of torch, which NCCL does not have."""
        scatter = torch.distributed.reduce_scatter_tensor

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count["reduce-scatter"] += 1
            self.is_paused = True
            try:
                return scatter(*args, **kwargs)
            finally:
                self.is_paused = False

        with patch.object(torch.distributed, "reduce_scatter_tensor", counted):
            yield

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if self.is_paused:
            return function(*args, **(kwargs or {}))
        if name.startswith("c10d."):
            found = [shown for part, shown in COLLECTIVES.items() if part in name]
            self.count.update(found)
        elif name.startswith(COPIES):
            self.count["copies"] += 1
        elif name.startswith("moesvd.joined_linear"):
            with self:  # It launches nothing itself; what it calls does.
                return joined_linear._init_fn(*args, **(kwargs or {}))
        elif not (function.is_view or name.startswith(NO_LAUNCH)):
            self.count["operators"] += 1
        return function(*args, **(kwargs or {}))


def write_config(folder: Path, model_type: str) -> None:
    """The config.json of one of MODELS in a new folder."""
    layers, own = MODELS[model_type]
    specs = {i: spec for i, spec in enumerate(layers.values()) if spec is not None}
    folder.mkdir()
    config = COMMON | own | {"model_type": model_type, "num_hidden_layers": len(layers)}
    config[CONFIG_KEY] = spec_to_json(CheckpointSpec(layers=specs))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def on_a_gpu() -> Iterator[Counter[str]]:
    """The project's layers take their GPU path; what they would launch is counted, not started."""
    from types import SimpleNamespace

    from vllm_moesvd import kernels, layer
    from vllm_moesvd.kernels import launching, tiles
    from vllm_moesvd.kernels.tiles import FALLBACK

    launched: Counter[str] = Counter()

    def launch(kernel: Any, grid: Any, /, **arguments: Any) -> None:
        launched[kernel.__name__] += 1

    def scratch(*wanted: Any) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in wanted]

    manager = SimpleNamespace(get_simultaneous=scratch)
    with ExitStack() as stack:
        for target, name, value in (
            (kernels, "can_run", lambda x: True),
            (launching, "launch", launch),
            (tiles, "device_arch", lambda index: FALLBACK),
            (layer, "current_workspace_manager", lambda: manager),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield launched


def count_block(block: torch.nn.Module, tokens: int) -> dict[str, int]:
    """What one call of vLLM's MoE block launches, by kind; within vLLM's forward context."""
    runner = block.experts
    experts = runner.routed_experts
    x_TD = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    weights_TK = torch.full((tokens, TOP_K), 0.5)
    ids_TK = torch.arange(TOP_K, dtype=torch.int32).repeat(tokens, 1)
    calls: Counter[str] = Counter()

    def route(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls["router"] += 1
        return weights_TK, ids_TK

    def fused(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls["vLLM's experts"] += 1
        return x.detach()

    def own(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return experts.quant_method.apply(experts, x, weights_TK, ids_TK, None, None)

    is_own = hasattr(experts, "spec")
    with (
        on_a_gpu() as launched,
        patch.object(runner.router, "select_experts", route),
        patch.object(
            type(experts), "forward_modular", lambda _, **k: (own if is_own else fused)(**k)
        ),
        patch.object(type(experts), "forward_monolithic", lambda _, **k: (route(), fused(**k))[1]),
        Dispatched() as dispatched,
        dispatched.without_gloo(),
        torch.no_grad(),
    ):
        block(x_TD)
    found = Counter({"own kernels": launched.total()}) + dispatched.count + calls
    return dict(found)


def run_process(rank: int, tp_size: int, replicate: bool, folder: Path) -> None:
    """Count every layer in one process of `tp_size`; the first writes `counts.json`."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for model_type in MODELS:
        config = EngineArgs(
            model=str(folder / model_type),
            load_format="dummy",
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            tensor_parallel_size=tp_size,
            additional_config={"moesvd": {"replicate": True}} if replicate else {},
        ).create_engine_config()
        if not counts:
            with set_current_vllm_config(config):
                init_distributed_environment(tp_size, rank, f"file://{folder}/store", rank, "gloo")
                ensure_model_parallel_initialized(tp_size, 1)
        counts |= count_model(config, MODELS[model_type][0])
    if rank == 0:
        (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def count_model(config: Any, layers: Iterable[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by form, tokens and kind, of a model whose layers have these forms."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_moesvd.latent_runner import LatentRunner

    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(config)
    for module in model.modules():
        if isinstance(module, LinearBase):
            # Ready as after loading, with weights that stay as they are: so they do on a GPU.
            module.cpu_linear = torch.nn.functional.linear
        if isinstance(module, LatentRunner):
            with on_a_gpu():
                module.prepare()
    counts: dict[str, dict[str, dict[str, int]]] = {}
    with set_current_vllm_config(config), set_forward_context(None, config):
        for name, decoder in zip(layers, model.model.layers, strict=True):
            block = getattr(decoder, "block_sparse_moe", None) or decoder.mlp
            counts[name] = {str(tokens): count_block(block, tokens) for tokens in BATCHES}
    return counts


def measure(tp_size: int, replicate: bool) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by form, tokens and kind, from `tp_size` new processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model_type in MODELS:
            write_config(folder / model_type, model_type)
        command = [sys.executable, "-m", "benchmarks.launches"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(tp_size), str(int(replicate)), name],
                # Different names, so that the processes exchange by gloo, not by shared memory.
                env=os.environ
                | ENVIRONMENT
                | {"VLLM_DIST_IDENT": f"{folder.name}-{rank}"}
                | {"VLLM_CPU_OMP_THREADS_BIND": "|".join("0" * tp_size)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(tp_size)
        ]
        logs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join(logs)[-6000:])
        found: dict[str, dict[str, dict[str, int]]] = json.loads(
            (folder / "counts.json").read_text(encoding="utf-8")
        )
        return found


def table() -> list[str]:
    """The Markdown table of docs/kernels.md."""
    lines = [
        "| form | TP | T | torch operators | copies | router | vLLM's experts | own kernels "
        "| collectives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, (tp_size, replicate) in MODES.items():
        for form, by_tokens in measure(tp_size, replicate).items():
            for tokens, count in by_tokens.items():
                collectives = [
                    name if count[name] == 1 else f"{count[name]} {name}"
                    for name in COLLECTIVES.values()
                    if name in count
                ]
                kinds = ("operators", "copies", "router", "vLLM's experts", "own kernels")
                cells = [form, mode, tokens, *(count.get(kind, 0) for kind in kinds)]
                cells.append(", ".join(collectives) or "none")
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    if len(sys.argv) == 5:
        rank, tp_size, replicate = map(int, sys.argv[1:4])
        run_process(rank, tp_size, bool(replicate), Path(sys.argv[4]))
        return
    sys.stdout.write("\n".join(table()) + "\n")


if __name__ == "__main__":
    main()
