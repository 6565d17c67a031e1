"""Text for a person: layers are named by the numbers they have."""

from __future__ import annotations

from typing import Any

import pytest

from compress_tool.summary import run_text


def result(layers: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = {
        f"{name}_{when}": 100 for name in ("total_params", "bytes") for when in ("before", "after")
    }
    return sizes | {
        "ratio": 0.4,
        "layers": layers,
        "seconds": 1,
        "peak_memory_bytes": 1,
        "out": "out",
        "already_finished": False,
    }


def layer(index: int, form: str, width: int | None = None) -> dict[str, Any]:
    return {"index": index, "form": form, "width": width, "measured_loss": 0.1}


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ([layer(i, "narrow", 72) for i in range(4)], "0–3 narrow width 72"),
        (
            [layer(5, "narrow", 72), layer(6, "dense"), layer(7, "narrow", 72)],
            "5 narrow width 72, 7 narrow width 72",
        ),
        (
            [layer(1, "narrow", 64), layer(2, "narrow", 64), layer(3, "narrow", 48)],
            "1–2 narrow width 64, 3 narrow width 48",
        ),
        # Every other layer has experts: no span stands for layers that are not meant.
        ([layer(1, "narrow", 8), layer(3, "narrow", 8)], "1 narrow width 8, 3 narrow width 8"),
    ],
)
def test_spans_hold_only_layers_that_are_meant(layers, shown):
    (line,) = [line for line in run_text(result(layers)).splitlines() if line.startswith("layers")]
    assert line.removeprefix("layers").strip() == shown
