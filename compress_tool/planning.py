"""Between calibration and the solver: which layers, at which ranks.

`first_plan` uses headers only and refuses what cannot be reached before anything is computed;
`final_plan` uses the statistics and is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from compress_tool.auto_plan import auto_specs
from compress_tool.calibration import ProgressCallback
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.paper_plan import final_paper_plan, first_paper_plan
from compress_tool.probe import probe_layers
from compress_tool.sizing import SizePlan, budget, plan_sizes, size_plan


def first_plan(checkpoint: Checkpoint, recipe: Recipe, layers: Sequence[int]) -> SizePlan:
    """The size plan before any statistics: refuses an unreachable ratio at once."""
    if recipe.method == "moe-svd":
        return first_paper_plan(checkpoint, recipe, layers)
    return plan_sizes(checkpoint, recipe, layers)


def final_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    directory: Path,
    progress: ProgressCallback,
    ids_NS: torch.Tensor,
    device: str,
) -> SizePlan:
    """The plan that is carried out.

    For moe-svd it needs routing and sensitivity, for auto the measured losses of single layers on
    the calibration windows `ids_NS`.
    """
    if recipe.method == "auto" and recipe.rank is None:
        probes = probe_layers(checkpoint, recipe, layers, ids_NS, directory, progress, device)
        asked, refitted = budget(checkpoint, recipe), recipe.num_refit_steps > 0
        specs = auto_specs(checkpoint, asked, probes, centre=recipe.centre, refitted=refitted)
        return size_plan(checkpoint, recipe, specs)
    if recipe.method == "moe-svd":
        return final_paper_plan(checkpoint, recipe, layers, directory, progress, device)
    return plan_sizes(checkpoint, recipe, layers)
