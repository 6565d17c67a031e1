"""One process of a group that computes MoE blocks: `python -m ... RANK SIZE FOLDER MODE...`.

Without an engine, so that any number of processes and sizes that no attention could split work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.vllm_moesvd import harness

MODES: dict[str, dict[str, Any]] = {
    "sharded": {},
    "replicated": {"additional_config": {"moesvd": {"replicate": True}}},
    "experts": {"enable_expert_parallel": True},
}
MODES |= {f"joined_{mode}": options for mode, options in MODES.items()}
"""How the processes share a layer: options of the engine. With `joined` latent layers multiply x
by the operator, as on a GPU."""


def main() -> None:
    """Read `x_TD` from the folder `work`, write each layer's output and the local sizes there."""
    rank, tp_size, work = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    modes = sys.argv[4:]
    x_TD = load_file(work / "input.safetensors")["x_TD"]
    outputs: dict[str, torch.Tensor] = {}
    elements: dict[str, int] = {}
    for mode in modes:
        arguments = {"tensor_parallel_size": tp_size} | MODES[mode]
        config = harness.engine_config(work / "checkpoint", **arguments)
        if mode == modes[0]:
            harness.join_processes(config, rank=rank, tp_size=tp_size, store=work / "store")
        # Counted before loading: vLLM repacks the weights of linear layers afterwards.
        elements |= {
            f"{mode}.{name}": parameter.numel()
            for name, parameter in harness.build_model(config).named_parameters()
        }
        config = harness.engine_config(work / "checkpoint", **arguments)
        if mode.startswith("joined_"):
            with harness.plain_weights():
                model = harness.load_model(config)
            assert harness.join_products(model)
        else:
            model = harness.load_model(config)
        for layer in range(6):
            outputs[f"{mode}.{layer}"] = harness.run_moe_block(model, config, layer, x_TD)
    save_file(outputs, work / f"output-{rank}.safetensors")
    (work / f"elements-{rank}.json").write_text(json.dumps(elements))


if __name__ == "__main__":
    main()
