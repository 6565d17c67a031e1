"""What the serving bench says that sizes allow, and the page it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.serving_models import CONFIG, FAMILY, form_of, step_work
from benchmarks.serving_page import Row, write_page
from vllm_moesvd.format import (
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    NarrowSpec,
    dense_layer_tensors,
    layer_tensors,
)

OWN = tuple(range(8))
SPECS: dict[str, LayerSpec | None] = {
    "dense": None,
    "narrow": NarrowSpec(width=4000),
    "latent": LatentSpec(rank_gate_up=1000, rank_down=900, width=7168),
    "shared-v": FactoredSpec(
        rank_gate_up=1000, rank_down=900, expert_slot=OWN, slot_group=(0,) * 8
    ),
    "svd": FactoredSpec(
        rank_gate_up=700, rank_down=600, expert_slot=OWN, slot_group=OWN, form="svd"
    ),
    "base": FactoredSpec(
        rank_gate_up=700,
        rank_down=600,
        expert_slot=OWN,
        slot_group=OWN,
        base_width=5000,
        form="base-delta",
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_large_batch_reads_every_weight_of_a_layer_once(name: str) -> None:
    spec, shape = SPECS[name], FAMILY.moe_shape(CONFIG)
    specs = dict.fromkeys(range(CONFIG["num_hidden_layers"]), spec)
    tensors = (
        dense_layer_tensors(shape, FAMILY, 0)
        if spec is None
        else layer_tensors(spec, shape, FAMILY, 0)
    )
    stored = sum(2 * torch.Size(size).numel() for size in tensors.values())
    one_expert = 2 * 3 * shape.hidden_size * shape.expert_width
    routed = CONFIG["num_hidden_layers"] * shape.top_k * one_expert
    rest = step_work({}, tokens=1, context=0).weight_bytes - routed
    read = step_work(specs, tokens=10_000, context=0).weight_bytes - rest
    assert read == pytest.approx(stored * CONFIG["num_hidden_layers"])


def test_one_token_computes_with_all_that_it_reads() -> None:
    """Two operations per weight of two bytes; a shared V down is read once for both choices."""
    for name, spec in SPECS.items():
        work = step_work({0: spec, 1: spec}, tokens=1, context=0)
        again = 2 * 2 * 900 * 7168 if name == "shared-v" else 0
        assert work.operations == pytest.approx(work.weight_bytes + again)


def test_the_page_names_what_falls_short(tmp_path: Path) -> None:
    latent = SPECS["latent"]
    assert latent is not None
    cells = {"decode 1": 1.5, "prefill 1024": 2.0}
    row = {"method": "latent", "ratio": 0.4, "form": form_of(latent), "allowed": cells}
    page = tmp_path / "page.md"
    write_page(page, [Row(**row, measured=cells)], mode="eager")
    assert "Nothing: no cell is slower than dense" in page.read_text()
    for measured, line in (
        (1.2, "less than 0.9 of what is allowed: decode 1 (0.80"),
        (0.9, "slower than dense: decode 1"),
    ):
        write_page(page, [Row(**row, measured=cells | {"decode 1": measured})], mode="eager")
        assert line in page.read_text()
