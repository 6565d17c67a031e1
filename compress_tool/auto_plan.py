"""From measured losses of single layers to a form, a width and a rank for each: method `auto`.

The loss of a candidate is read off the probes of its layer: KL of the narrow form at its width plus
KL of the latent form at its rank, as if the two added up, and layers too. On pocket-mixtral the
sum over layers was 0.0021, 0.0082 and 0.0260 nats at 20, 40 and 60 %, the measured joint KL after
the refit 0.0017, 0.0072 and 0.0246 (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

from compress_tool.allocation import Candidate, allocate
from compress_tool.checkpoint import Checkpoint
from compress_tool.errors import ResourceError
from compress_tool.plan import RANK_STEPS, RATIO_WINDOW, STEPS_PER_RANK, Budget, spec_params
from compress_tool.probe import LayerProbes, probe_ranks, probe_widths
from vllm_moesvd.format import LatentSpec, LayerSpec, MoEShape, NarrowSpec

NARROW_REFIT_SHARE: Final = 0.5
LATENT_REFIT_SHARE: Final = 0.85
"""What a refit leaves of the KL of either part; measured on layers 1, 4 and 6 of pocket-mixtral
at widths 96 to 245 and ranks 64 to 128 of 128 (0.46 to 0.57, and 0.7 to 0.95)."""

SMALLEST_LOSS: Final = 1e-9
"""Below any KL that can be told from rounding; keeps logarithms finite."""


def auto_specs(
    checkpoint: Checkpoint,
    budget: Budget,
    probes: Mapping[int, LayerProbes],
    *,
    centre: bool,
    refitted: bool,
) -> dict[int, LayerSpec]:
    """Specs of the layers that do not stay dense, within the promised window of the ratio."""
    error: ResourceError | None = None
    for step in width_steps(checkpoint.shape, budget):
        candidates = {
            layer: _candidates(checkpoint, budget, values, step, centre=centre, refitted=refitted)
            for layer, values in probes.items()
        }
        try:
            chosen = allocate(budget, candidates)
        except ResourceError as failed:
            error = failed
            continue
        return {layer: item.spec for layer, item in chosen.items() if item.spec is not None}
    assert error is not None
    raise error


def width_steps(shape: MoEShape, budget: Budget) -> list[int]:
    """Steps of the widths to try: the largest that is fine enough, then ever finer ones."""
    per_neuron = 3 * shape.num_experts * shape.hidden_size
    window = RATIO_WINDOW * budget.base_params
    finest = [
        step
        for step in RANK_STEPS
        if step * per_neuron * 2 <= window and step * STEPS_PER_RANK <= shape.expert_width
    ]
    return [*finest, 1] if 1 not in finest else finest


def narrow_loss(probes: LayerProbes, shape: MoEShape, width: int) -> float:
    """KL of the narrow form at any width.

    Between two probes its logarithm is linear in the width, below the smallest it goes on with the
    slope of the last two; above the largest the KL goes linearly to 0 at full width.
    """
    if width >= shape.expert_width:
        return 0.0
    points: list[tuple[int, float]] = []
    for probed in probe_widths(shape):
        # Noise must not make a smaller layer look better than a larger one.
        floor = points[-1][1] if points else SMALLEST_LOSS
        points.append((probed, max(probes[f"narrow-{probed}"], floor)))
    widest, loss = points[0]
    if width >= widest:
        return loss * (shape.expert_width - width) / max(1, shape.expert_width - widest)
    if len(points) == 1:
        return loss
    upper, lower = next(
        (pair for pair in pairwise(points) if width >= pair[1][0]), (points[-2], points[-1])
    )
    slope = (math.log(lower[1]) - math.log(upper[1])) / (lower[0] - upper[0])
    return math.exp(math.log(lower[1]) + slope * (width - lower[0]))


def expected_kl(
    spec: LayerSpec | None, probes: LayerProbes, shape: MoEShape, *, refitted: bool
) -> float:
    """The loss at which the allocator took this layer; 0 for a dense one."""
    if spec is None:
        return 0.0
    if not isinstance(spec, LatentSpec | NarrowSpec):
        raise TypeError(f"auto never chooses the form {spec.form}")
    kl = (NARROW_REFIT_SHARE if refitted else 1.0) * narrow_loss(probes, shape, spec.width)
    if isinstance(spec, LatentSpec):
        kl += (LATENT_REFIT_SHARE if refitted else 1.0) * probes[f"latent-{spec.rank_gate_up}"]
    return kl


def _candidates(
    checkpoint: Checkpoint,
    budget: Budget,
    probes: LayerProbes,
    step: int,
    *,
    centre: bool,
    refitted: bool,
) -> Sequence[Candidate]:
    shape = checkpoint.shape
    candidates = [Candidate(spec=None, params=budget.dense_layer_params, loss=0.0)]
    for width in [*range(step, shape.expert_width, step), shape.expert_width]:
        specs: list[LayerSpec] = []
        if width < shape.expert_width:
            specs.append(NarrowSpec(width=width))
        specs += (
            LatentSpec(rank_gate_up=rank, rank_down=rank, width=width, bias=centre)
            for rank in probe_ranks(shape)
        )
        for spec in specs:
            params = spec_params(spec, shape, checkpoint.family)
            if params < budget.dense_layer_params:
                loss = expected_kl(spec, probes, shape, refitted=refitted)
                candidates.append(Candidate(spec=spec, params=params, loss=loss))
    return candidates
