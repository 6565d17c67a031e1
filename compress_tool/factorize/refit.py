"""Refit of a compressed layer against the dense layer's output, by gradient descent. Optional.

Least squares gives the best down projection for the neurons that were kept; it cannot move the
neurons themselves. This does: Adam on all factors of one layer, to minimise ‖y − ŷ‖² over the
calibration tokens. On pocket-mixtral it halves the KL that a narrow layer costs (docs/log.md).

Only the layer's own inputs and outputs are used: no labels, no gradient through the model.
Deterministic for given inputs, seed and machine, and within `steady_sums` whatever the number of
threads: it then takes one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compress_tool.factorize.problem import LayerProblem, energy
from compress_tool.factors import LatentFactors, NarrowFactors

BATCH_TOKENS: Final = 2048
"""Tokens of one step: 30 steps pass over the fitted part of 128 sequences of 512 tokens."""

RATE: Final = 0.06
"""Largest step relative to the root mean square of a tensor. It is 3e-3 on pocket-mixtral, where a
third of that gains a tenth less and nothing diverged."""

MAX_PASSES: Final = 50
"""Over few tokens more passes only overfit; the default is ten."""

WARM_UP_STEPS: Final = 20
BETAS: Final = (0.9, 0.99)

JUDGE_SHARE: Final = 16
JUDGE_BLOCK: Final = 64
"""Of 16 blocks of 64 tokens one is not fitted: it judges whether the fit helped. Spread over the
text, whose end may be about other things than the rest."""

RefitFactors = LatentFactors | NarrowFactors


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitResult:
    """The better of the given and the fitted factors on the tokens kept out of the fit.

    `error_before` and `error_after` are ‖y − ŷ‖² / ‖y‖² there, for the given and fitted factors.
    """

    factors: RefitFactors
    error_before: float
    error_after: float


def refit(
    problem: LayerProblem, factors: RefitFactors, target_TD: torch.Tensor, *, steps: int, seed: int
) -> RefitResult:
    """Fit all factors to give `target_TD` (fp32 [T, D]) on the problem's tokens.

    Memory: the factors, their gradients and two moments in fp32, and the activations of one batch.
    """
    num_tokens = target_TD.shape[0]
    token_T = torch.arange(num_tokens)
    is_judged_T = token_T // JUDGE_BLOCK % JUDGE_SHARE == JUDGE_SHARE - 1
    if not bool(is_judged_T.any()):
        is_judged_T = token_T % JUDGE_SHARE == JUDGE_SHARE - 1
    judged_n, fitted_n = token_T[is_judged_T], token_T[~is_judged_T]
    start = _parameters(factors, problem.device)
    fitted = [tensor.clone().requires_grad_(True) for tensor in start]
    _descend(problem, factors, fitted, target_TD, fitted_n, steps, seed)
    fitted = [tensor.detach() for tensor in fitted]
    before = _error(problem, factors, start, target_TD, judged_n)
    after = _error(problem, factors, fitted, target_TD, judged_n)
    better = math.isfinite(after) and after < before
    return RefitResult(
        factors=_rebuilt(factors, fitted if better else start),
        error_before=before,
        error_after=after,
    )


def _descend(
    problem: LayerProblem,
    factors: RefitFactors,
    fitted: list[torch.Tensor],
    target_TD: torch.Tensor,
    fitted_n: torch.Tensor,
    steps: int,
    seed: int,
) -> None:
    rates = [RATE * tensor.detach().square().mean().sqrt().item() for tensor in fitted]
    groups = [{"params": [t], "lr": rate} for t, rate in zip(fitted, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    generator = torch.Generator().manual_seed(seed)
    num_fitted = len(fitted_n)
    scale = max(energy(target_TD) / target_TD.numel(), torch.finfo(torch.float32).tiny)
    batch = min(BATCH_TOKENS, num_fitted)
    steps = min(steps, MAX_PASSES * math.ceil(num_fitted / batch))
    shuffled_n = fitted_n[torch.randperm(num_fitted, generator=generator)]
    position = 0
    for step in range(steps):
        pace = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * pace
        if position + batch > num_fitted:
            shuffled_n = fitted_n[torch.randperm(num_fitted, generator=generator)]
            position = 0
        token_n = shuffled_n[position : position + batch]
        position += batch
        with torch.enable_grad():
            y_nD = _output(problem, factors, fitted, token_n)
            error = (y_nD - target_TD[token_n].to(y_nD.device)).square().mean()
            loss = error / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _parameters(factors: RefitFactors, device: str) -> list[torch.Tensor]:
    """Everything that is fitted; a bias is left as it is."""
    if isinstance(factors, NarrowFactors):
        tensors = [factors.gate_EFD, factors.up_EFD, factors.down_EDF]
    else:
        tensors = [factors.gate_EFR, factors.up_EFR, factors.down_ERF]
        tensors += [factors.v_gate_up_RD, factors.q_DR]
    return [tensor.detach().to(device, torch.float32) for tensor in tensors]


def _rebuilt(factors: RefitFactors, tensors: Sequence[torch.Tensor]) -> RefitFactors:
    if isinstance(factors, NarrowFactors):
        gate, up, down = tensors
        return NarrowFactors(gate_EFD=gate, up_EFD=up, down_EDF=down)
    gate, up, down, v_RD, q_DR = tensors
    return LatentFactors(
        v_gate_up_RD=v_RD,
        gate_EFR=gate,
        up_EFR=up,
        down_ERF=down,
        q_DR=q_DR,
        bias_D=factors.bias_D,
    )


def _output(
    problem: LayerProblem,
    factors: RefitFactors,
    tensors: Sequence[torch.Tensor],
    token_n: torch.Tensor,
) -> torch.Tensor:
    """The layer's output for some tokens, [n, D] on the problem's device."""
    gate, up, down, *outer = tensors
    statistics = problem.statistics
    x_nD = statistics.x_TD[token_n].float().to(problem.device)
    index_nK = statistics.index_TK[token_n].to(problem.device)
    gate_nK = statistics.gate_TK[token_n].float().to(problem.device)
    z = x_nD @ outer[0].T if outer else x_nD
    y = torch.zeros(len(token_n), down.shape[1], device=problem.device)
    for expert in range(problem.shape.num_experts):
        row, slot = torch.nonzero(index_nK == expert, as_tuple=True)
        if row.numel() == 0:
            continue
        z_e = z[row]
        h = problem.activation(z_e @ gate[expert].T) * (z_e @ up[expert].T)
        y = y.index_add(0, row, (h @ down[expert].T) * gate_nK[row, slot, None])
    y = y @ outer[1].T if outer else y
    bias_D = factors.bias_D if isinstance(factors, LatentFactors) else None
    return y if bias_D is None else y + bias_D.to(problem.device)


@torch.no_grad()
def _error(
    problem: LayerProblem,
    factors: RefitFactors,
    tensors: Sequence[torch.Tensor],
    target_TD: torch.Tensor,
    token_n: torch.Tensor,
) -> float:
    error = total = 0.0
    for chunk in torch.split(token_n, BATCH_TOKENS):
        target_nD = target_TD[chunk].double()
        y_nD = _output(problem, factors, tensors, chunk).double().cpu()
        error += (y_nD - target_nD).square().sum().item()
        total += target_nD.square().sum().item()
    return error / total if total > 0 else 0.0
