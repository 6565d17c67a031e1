"""How many U matrices MoE-SVD keeps in a layer: the adaptive k of the authors' reply to reviews.

    k = argmin L(k) + λ Q(k),   L(k) = 1 − Σ_{i ≤ k} f_i s_i / Σ_i f_i s_i

with the experts in order of their frequency f_i, and s_i the sum of expert i's singular values.
Q is the parameter count. V is stored whatever k is, and a U costs the same rank by rank, so Q is
counted here as the share of the layer's U matrices that are stored: the same minimum, without
knowing the rank, and a λ that means the same for every model. With frequencies that all differ,
the k-th U is kept while its f s is above λ times the mean of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from compress_tool.factorize.moe_svd import MoESVDOptions, trimmed_slots


def coverage_loss(
    frequency_E: torch.Tensor, singular_sums: Sequence[float], options: MoESVDOptions
) -> float:
    """L(k): the share of Σ f s that the k most frequent experts of every group do not hold."""
    slots = trimmed_slots(frequency_E, options)
    num_experts = frequency_E.shape[0]
    weight_E = frequency_E.double() * torch.tensor(singular_sums, dtype=torch.float64)
    total = weight_E.sum().item()
    if total == 0.0:
        return 0.0
    kept = 0.0
    for group in range(options.groups):
        members = [e for e in range(num_experts) if slots.expert_group[e] == group]
        members.sort(key=lambda e: (-frequency_E[e].item(), e))
        kept += sum(weight_E[e].item() for e in members[: options.k])
    return 1.0 - kept / total


def adaptive_k(
    frequency_E: torch.Tensor,
    singular_sums: Sequence[float],
    options: MoESVDOptions,
    penalty: float,
) -> int:
    """The k from 1 to the size of a group with the least L(k) + `penalty` Q(k).

    Of equal ones the largest: experts that are equally frequent keep a U each, so a larger k can
    be free.
    """
    num_experts = frequency_E.shape[0]
    largest = -(-num_experts // options.groups)
    best, best_k = float("inf"), 1
    for k in range(1, largest + 1):
        tried = replace(options, k=k)
        stored = len(trimmed_slots(frequency_E, tried).slot_experts) / num_experts
        value = coverage_loss(frequency_E, singular_sums, tried) + penalty * stored
        if value <= best:
            best, best_k = value, k
    return best_k


def planned_k(
    frequency_E: torch.Tensor, options: MoESVDOptions, expert_slot: tuple[int, ...]
) -> int:
    """The k that `adaptive_k` chose, read off the slots it led to: the largest that gives them."""
    largest = -(-frequency_E.shape[0] // options.groups)
    for k in range(largest, 0, -1):
        if trimmed_slots(frequency_E, replace(options, k=k)).expert_slot == expert_slot:
            return k
    raise ValueError(f"no k gives the slots {expert_slot}")
