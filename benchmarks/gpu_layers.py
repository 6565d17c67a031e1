"""Times of one MoE layer on a GPU, dense and factored, inside vLLM and a CUDA graph.

    python -m benchmarks.gpu_layers [--models Mixtral-8x7B ...] [--forms dense latent-40 ...]
                                    [--tokens 1 8 64 512 4096] [--out FILE.json]

Each layer is the router and the experts of a Mixtral-shaped model of one decoder layer, built and
filled by vLLM (`--load-format dummy`: random numbers), so dense layers run vLLM's own fused MoE
with its own tile configurations, and factored ones run what `vllm serve` runs. A graph holds
several calls with different tokens, so that no batch finds its experts in the cache; what is
printed is the median of its replays per call. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.moe_layers import MODELS, Model
from benchmarks.roofline import BATCHES, BYTES_PER_SECOND, FLOPS_PER_SECOND
from vllm_moesvd.format import (
    CONFIG_KEY,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    spec_to_json,
)

FORMS: Final = (
    "dense",
    "latent-20",
    "latent-40",
    "latent-60",
    "narrow-40",
    "shared-v-40",
    "svd-40",
    "base-delta-40",
)
REPLAYS: Final = 30


def layer_spec(model: Model, form: str) -> LayerSpec | None:
    """The layer `<form>-<per cent of the routed experts' parameters removed>`; None is dense.

    Ranks and widths are multiples of 64, rounded down.
    """
    if form == "dense":
        return None
    name, _, per_cent = form.rpartition("-")
    removed = int(per_cent) / 100
    d, f, e = model.hidden_size, model.expert_width, model.num_experts
    kept = (1 - removed) * 3 * e * d * f
    if name == "latent":
        rank = int(kept / (3 * e * f + 2 * d)) // 64 * 64
        return LatentSpec(rank_gate_up=rank, rank_down=rank, width=f)
    if name == "narrow":
        return NarrowSpec(width=int((1 - removed) * f) // 64 * 64)
    slots = tuple(range(e))
    if name == "svd":
        rank = int(kept / (3 * e * (d + f))) // 16 * 16
        return FactoredSpec(
            rank_gate_up=rank, rank_down=rank, expert_slot=slots, slot_group=slots, form="svd"
        )
    if name in ("shared-v", "base-delta"):
        is_based = name == "base-delta"
        rank, rank_down = model.ranks(removed, "base-delta" if is_based else "shared-v")
        return FactoredSpec(
            rank_gate_up=rank,
            rank_down=rank_down,
            expert_slot=slots,
            slot_group=(0,) * e,
            base_width=f if is_based else 0,
            form="base-delta" if is_based else "shared-v",
        )
    raise SystemExit(f"--forms {form}: expected one of {', '.join(FORMS)} or another per cent")


def write_config(folder: Path, model: Model, form: str, num_layers: int = 1) -> None:
    """A folder with config.json only: all that vLLM needs for random weights."""
    spec = layer_spec(model, form)
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.expert_width,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.top_k,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.hidden_size // 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if spec is not None:
        layers = CheckpointSpec(layers=dict.fromkeys(range(num_layers), spec))
        config |= {
            "architectures": ["MixtralMoESVDForCausalLM"],
            CONFIG_KEY: spec_to_json(layers),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def bytes_and_flops(model: Model, form: str, tokens: int) -> tuple[float, float]:
    """The least that a batch must read, and its operations, if routing is uniform."""
    spec = layer_spec(model, form)
    d, f, used, pairs = (
        model.hidden_size,
        model.expert_width,
        model.used_experts(tokens),
        tokens * model.top_k,
    )
    shared, per_expert = 0, 3 * d * f
    if isinstance(spec, LatentSpec):
        shared = 2 * d * spec.rank_gate_up
        per_expert = 3 * spec.rank_gate_up * f
    elif isinstance(spec, NarrowSpec):
        per_expert = 3 * d * spec.width
    elif isinstance(spec, FactoredSpec):
        gate_up, down = spec.rank_gate_up, spec.rank_down
        per_expert = 2 * f * gate_up + d * down
        v_down = f * down
        if spec.form == "svd":
            per_expert += 2 * d * gate_up + v_down
        else:
            base = 3 * d * spec.base_width
            shared, per_token = 2 * d * gate_up + v_down + base, 2 * d * gate_up + base
            return (
                2.0 * (shared + used * per_expert),
                2.0 * (tokens * per_token + pairs * (per_expert + v_down)),
            )
    return 2.0 * (shared + used * per_expert), 2.0 * (tokens * shared + pairs * per_expert)


def time_layer(block: torch.nn.Module, config: Any, tokens: int, hidden: int) -> float:
    """Microseconds of one call: the median of the replays of a graph with several calls."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    calls = 16 if tokens <= 64 else 4
    generator = torch.Generator("cuda").manual_seed(tokens)
    batches = [
        torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
        for _ in range(calls)
    ]
    with set_current_vllm_config(config), set_forward_context(None, config), torch.no_grad():
        return graph_micros([partial(block, batch) for batch in batches])


def graph_micros(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of `calls` in the replays of a CUDA graph that holds them all, µs."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def build(model: Model, form: str, max_tokens: int) -> tuple[torch.nn.Module, Any]:
    """The MoE block of the layer with random weights, and the configuration it was built with."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
        model_parallel_is_initialized,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.workspace import init_workspace_manager

    load_general_plugins()
    folder = Path(tempfile.mkdtemp())
    write_config(folder, model, form)
    config = EngineArgs(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_batched_tokens=max_tokens,
    ).create_engine_config()
    if not model_parallel_is_initialized():
        with set_current_vllm_config(config):
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, "nccl")
            ensure_model_parallel_initialized(1, 1)
            init_workspace_manager(torch.device("cuda:0"))
    built = get_model(vllm_config=config)
    block: torch.nn.Module = built.model.layers[0].block_sparse_moe
    # Dummy numbers would send nearly every token to the same experts.
    torch.nn.init.normal_(block.get_parameter("gate.weight"), std=0.02)
    return block, config


def say(text: str) -> None:
    """Print at once: a benchmark that is stopped has shown what it measured."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def no_gpu(name: str) -> int:
    """Tell the user that this machine cannot run the benchmark; the exit code."""
    sys.stderr.write(f"benchmarks.{name}: no GPU here; this benchmark needs one\n")
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        return no_gpu("gpu_layers")
    rows = []
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    say("| model | form | T | µs | × dense | allowed | GB/s | TFLOP/s | of the bound |")
    say("|---|---|---|---|---|---|---|---|---|")
    for model in (model for model in MODELS if model.name in given.models):
        dense: dict[int, float] = {}
        for form in given.forms:
            block, config = build(model, form, max(given.tokens))
            for tokens in given.tokens:
                micros = time_layer(block, config, tokens, model.hidden_size)
                num_bytes, flops = bytes_and_flops(model, form, tokens)
                bound = max(num_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND) * 1e6
                dense_bytes, dense_flops = bytes_and_flops(model, "dense", tokens)
                allowed = max(
                    dense_bytes / BYTES_PER_SECOND, dense_flops / FLOPS_PER_SECOND
                ) * 1e6 / bound  # fmt: skip
                if form == "dense":
                    dense[tokens] = micros
                faster = dense[tokens] / micros if tokens in dense else float("nan")
                rows.append(
                    {"model": model.name, "form": form, "tokens": tokens, "micros": micros,
                     "times_dense": faster, "allowed": allowed, "bytes": num_bytes,
                     "flops": flops, "bound": bound}
                )  # fmt: skip
                say(
                    f"| {model.name} | {form} | {tokens} | {micros:.1f} | {faster:.2f} "
                    f"| {allowed:.2f} | {num_bytes / micros / 1e3:.0f} "
                    f"| {flops / micros / 1e6:.0f} | {bound / micros:.2f} |"
                )
            del block
            torch.cuda.empty_cache()
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
