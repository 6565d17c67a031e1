"""The latent form: one V for gate and up of all experts, one Q for the summed output.

Gate and up share V by the pooled, activation-weighted problem (mathematics §3.1). Q spans the top
eigenvectors of E[y yᵀ] of the *summed* layer output y, which reaches the Eckart–Young floor of
that output (mathematics §3.2). With `centre`, Q comes from the centred moment and a bias carries
the mean: at most one rank's worth of error less, since an affine R-space lies in a linear R+1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress_tool.factorize.problem import LayerProblem, energy
from compress_tool.factorize.products import moment, product, product_dtype
from compress_tool.factorize.row_weights import row_weights
from compress_tool.factorize.shared_basis import solve_shared_basis
from compress_tool.factorize.shared_v import pooled_inputs
from compress_tool.factorize.whitening import solve_spd, symmetric_eigen, tail_share
from compress_tool.factors import LatentFactors
from compress_tool.side_by_side import side_by_side


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSolution:
    """Factors, the two spectra behind them, and the losses those spectra predict.

    `predicted_gate_up` and `predicted_down` are shares of routed pre-activation energy and of
    summed output energy. `spectrum_*` are eigenvalues, largest first.
    `random_floor_*` are the losses that random weights of this layer would have at these ranks.
    """

    factors: LatentFactors
    spectrum_gate_up: torch.Tensor
    spectrum_down: torch.Tensor
    predicted_gate_up: float
    predicted_down: float
    random_floor_gate_up: float
    random_floor_down: float


def solve_latent(
    problem: LayerProblem,
    y_TD: torch.Tensor,
    rank_gate_up: int,
    rank_down: int,
    *,
    centre: bool = False,
    weigh_rows: bool = True,
) -> LatentSolution:
    """Factor one layer in the latent form; `y_TD` is its dense routed output.

    The cores have as many neurons as `problem.experts` gives: fewer than the dense layer's if the
    problem is one of narrowed experts.
    """
    experts = range(problem.shape.num_experts)
    width = problem.experts(0)[0].shape[0]
    gate_up = solve_shared_basis(
        experts,
        problem.input_rows,
        lambda expert: torch.cat(problem.experts(expert)[:2]),
        rank_gate_up,
        store_dtype=problem.store_dtype,
        row_weights=(lambda expert: torch.cat(row_weights(problem, expert)))
        if weigh_rows
        else None,
        pooled=pooled_inputs(problem, experts),
        workers=problem.workers,
    )
    mean_D = y_TD.double().mean(dim=0) if centre else None
    centred_TD = y_TD if mean_D is None else y_TD.double() - mean_D
    moment_DD = moment(centred_TD.to(problem.device))
    dtype = product_dtype(len(moment_DD))
    spectrum_D, vectors_DD = symmetric_eigen(moment_DD)
    q_DR = vectors_DD[:, :rank_down].to(problem.store_dtype).double()
    # Q was rounded: least squares against the stored values, not the transpose.
    project_RD = solve_spd(q_DR.T @ q_DR, q_DR.T)
    bias_D = None if mean_D is None else _bias(mean_D.to(q_DR.device), q_DR, project_RD)

    def core(expert: int) -> torch.Tensor:
        down_FD = problem.experts(expert)[2].to(dtype).T.contiguous()
        return product(project_RD.to(dtype), down_FD).float()

    down = list(side_by_side(core, experts, problem.workers))
    total = energy(y_TD)
    tail = tail_share(spectrum_D, rank_down) * spectrum_D.clamp(min=0).sum().item()
    return LatentSolution(
        factors=LatentFactors(
            v_gate_up_RD=gate_up.v_RD,
            gate_EFR=torch.stack([gate_up.u_MR[expert][:width] for expert in experts]),
            up_EFR=torch.stack([gate_up.u_MR[expert][width:] for expert in experts]),
            down_ERF=torch.stack(down),
            q_DR=q_DR.float(),
            bias_D=bias_D,
        ),
        spectrum_gate_up=gate_up.spectrum_D,
        spectrum_down=spectrum_D,
        predicted_gate_up=gate_up.predicted_loss,
        predicted_down=tail / total if total > 0 else 0.0,
        random_floor_gate_up=gate_up.random_floor,
        # Random down weights spread the output evenly over all D directions.
        random_floor_down=1 - rank_down / problem.shape.hidden_size,
    )


def _bias(mean_D: torch.Tensor, q_DR: torch.Tensor, project_RD: torch.Tensor) -> torch.Tensor:
    """b = (I − Q Q⁺) μ: the part of the mean that Q cannot carry."""
    return (mean_D - q_DR @ (project_RD @ mean_D)).float()
