"""Method `svd`: per expert and projection, a rank-R product fitted to the expert's gated tokens.

Gate and up minimise ‖D½ (W − U V) Xᵀ‖² over the expert's tokens X; D weighs each neuron by what an
error in it does to the output (mathematics §3.1). Down is then fitted to what the compressed gate
and up give: the least-squares W̃ from their neurons h' to the dense output W2 h, truncated in the
metric of h' (mathematics §3.4). Together they take an eighth of the error on held-out tokens of
pocket-mixtral away (docs/log.md).

No SVD is computed and nothing larger than the smaller side of W is decomposed:

* W wide or square: the eigenvectors of (X Wᵀ)ᵀ(X Wᵀ) give U; V = Uᵀ W needs no inverse.
* W tall: XᵀX = S Sᵀ is shared by gate and up; the eigenvectors of Sᵀ(WᵀW)S, times S⁻¹, are V.

Products over tokens run in fp64 up to PRECISE_SIZE, above it in fp32 chunks summed in fp64.
Memory: the tokens of the experts in work, and up to FOLLOWED_WIDTH neurons on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import pad

from compress_tool.factorize.moments import cholesky, completed, ridged
from compress_tool.factorize.per_expert import Truncated, stacked_solution, truncate
from compress_tool.factorize.problem import Activation, ExpertWeights, LayerProblem
from compress_tool.factorize.products import (
    CHUNK_ROWS,
    IMAGES,
    inner,
    leading,
    product,
    product_dtype,
    products,
)
from compress_tool.factorize.row_weights import RowWeights
from compress_tool.factorize.shared_v import SharedSolution
from compress_tool.factorize.whitening import DAMPING, orthonormal_rows, solve_spd, tail_share
from compress_tool.side_by_side import side_by_side
from vllm_moesvd.format import PROJECTIONS, Projection

FOLLOWED_WIDTH: Final = 2048
"""Up to this width W̃ is solved for, F x F. Wider experts fit U alone, which has half the gain."""

ROUNDING_MARGIN: Final = 16.0
"""A rounded V is refitted where its eps²/12 of the energy is half a percent of the tail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """What one expert saw, chunk by chunk: inputs x and routing weights g [n, 1], and with them
    W1 x and W3 x where W is wide, g h up to FOLLOWED_WIDTH neurons, and g W2 h above it.
    """

    x: list[torch.Tensor]
    scale: list[torch.Tensor]
    gate: list[torch.Tensor]
    up: list[torch.Tensor]
    h: list[torch.Tensor]
    y: list[torch.Tensor]
    gate_weight_F: torch.Tensor
    up_weight_F: torch.Tensor
    count: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Metric:
    """Σ g² x xᵀ, damped, and its lower root, [D, D]: what gate and up share where W is tall."""

    gram_DD: torch.Tensor
    root_DD: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Compressed:
    """Factors of gate or up, and V x of every token, chunk by chunk."""

    part: Truncated
    latent: list[torch.Tensor]


def solve_weighted_svd(
    problem: LayerProblem,
    rank_gate_up: int,
    rank_down: int,
    *,
    weigh_rows: bool = True,
    follow: bool = True,
) -> SharedSolution:
    """Factor one layer, expert by expert; U and V in fp32, V in the values of the storage dtype.

    Without `weigh_rows` all neurons weigh the same; without `follow` down is fitted to the dense
    neurons. An expert without tokens gets the plain SVD of its weights.
    """
    parts: dict[Projection, list[Truncated]] = {projection: [] for projection in PROJECTIONS}

    def solved(expert: int) -> tuple[Truncated, Truncated, Truncated]:
        return _solve_expert(problem, expert, rank_gate_up, rank_down, weigh_rows, follow)

    for found in side_by_side(solved, range(problem.shape.num_experts), problem.workers):
        for projection, part in zip(PROJECTIONS, found, strict=True):
            parts[projection].append(part)
    return stacked_solution(parts, rank_gate_up, rank_down)


def _solve_expert(
    problem: LayerProblem,
    expert: int,
    rank_gate_up: int,
    rank_down: int,
    weigh_rows: bool,
    follow: bool,
) -> tuple[Truncated, Truncated, Truncated]:
    weights = problem.experts(expert)
    dtype = product_dtype(max(weights[0].shape))
    gate_FD, up_FD, down_DF = (weight.to(dtype) for weight in weights)
    tokens = _tokens(problem, expert, (gate_FD, up_FD, down_DF), weigh_rows)
    if tokens.count == 0:
        ranks = rank_gate_up, rank_gate_up, rank_down
        plain = [_plain(w, r, problem.store_dtype) for w, r in zip(weights, ranks, strict=True)]
        return plain[0], plain[1], plain[2]
    metric = None if len(gate_FD) <= gate_FD.shape[1] else _metric(tokens)
    store = problem.store_dtype
    gate = _gate_or_up(
        gate_FD, tokens, tokens.gate, metric, tokens.gate_weight_F, rank_gate_up, store
    )
    up = _gate_or_up(up_FD, tokens, tokens.up, metric, tokens.up_weight_F, rank_gate_up, store)
    followed = _followed(problem.activation, tokens, gate, up) if follow else None
    down = (_down_narrow if tokens.h else _down_wide)(down_DF, tokens, followed, rank_down, store)
    return gate.part, up.part, down


def _tokens(
    problem: LayerProblem, expert: int, weights: ExpertWeights, weigh_rows: bool
) -> _Tokens:
    gate_FD, up_FD, down_DF = weights
    width, size = gate_FD.shape
    dtype = gate_FD.dtype
    token_n, gate_n = problem.statistics.tokens_of(expert)
    x, scale, gate, up, h, y = ([] for _ in range(6))  # type: ignore[var-annotated]
    weights_of_rows = RowWeights(down_DF)
    for token_c, gate_c in zip(
        torch.split(token_n, CHUNK_ROWS), torch.split(gate_n, CHUNK_ROWS), strict=True
    ):
        # Tokens of weight 0 make up whole images: every sum here has g in each of its terms.
        missing = -len(token_c) % IMAGES
        token_c, gate_c = pad(token_c, (0, missing)), pad(gate_c, (0, missing))
        x.append(problem.statistics.x_TD[token_c].to(problem.device, dtype))
        scale.append(gate_c.to(problem.device, dtype)[:, None])
        a_nF, u_nF = products(x[-1], (gate_FD, up_FD))
        if weigh_rows:
            weights_of_rows.add(a_nF, u_nF, scale[-1], problem.activation)
        h_nF = (problem.activation(a_nF) * u_nF).mul_(scale[-1])
        if width <= size:
            gate.append(a_nF)
            up.append(u_nF)
        if width <= FOLLOWED_WIDTH:
            h.append(h_nF)
        else:
            y.append(product(h_nF, down_DF))
    gate_weight_F, up_weight_F = weights_of_rows.result()
    return _Tokens(
        x=x,
        scale=scale,
        gate=gate,
        up=up,
        h=h,
        y=y,
        gate_weight_F=gate_weight_F,
        up_weight_F=up_weight_F,
        count=len(token_n),
        dtype=dtype,
    )


def _metric(tokens: _Tokens) -> _Metric:
    gated = [x * scale for x, scale in zip(tokens.x, tokens.scale, strict=True)]
    gram_DD = ridged(_summed(gated, gated), DAMPING)
    root_DD = cholesky(gram_DD).to(tokens.dtype)
    return _Metric(gram_DD.to(tokens.dtype), root_DD)


def _summed(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ over chunks of leftᵀ right, fp64."""
    total: torch.Tensor | None = None
    for left_na, right_nb in zip(left, right, strict=True):
        part_ab = inner(left_na, right_nb)
        total = part_ab if total is None else total.add_(part_ab)
    assert total is not None, "an expert with tokens has a chunk"
    return total


def _plain(w_mn: torch.Tensor, rank: int, store: torch.dtype) -> Truncated:
    """The plain SVD, with U fitted to the rounded V."""
    found = truncate(w_mn.double(), torch.eye(w_mn.shape[1], device=w_mn.device).double(), rank)
    v_Rn = found.v_Rn.to(store).double()
    u_Rm = solve_spd(v_Rn @ v_Rn.T, v_Rn @ w_mn.double().T)
    return Truncated(u_mR=u_Rm.T, v_Rn=v_Rn, spectrum=found.spectrum)


def _gate_or_up(
    w_FD: torch.Tensor,
    tokens: _Tokens,
    images: list[torch.Tensor],
    metric: _Metric | None,
    weight_F: torch.Tensor,
    rank: int,
    store: torch.dtype,
) -> _Compressed:
    """`metric` is given where W is tall, `images` (W x of every token) where it is not."""
    dtype = tokens.dtype
    root_F = weight_F.sqrt()
    weighted_FD = root_F.to(dtype)[:, None] * w_FD
    if metric is not None:
        energy_DD = inner(weighted_FD, weighted_FD).to(dtype)
        v_RD, spectrum = _whitened_rows(energy_DD, metric.root_DD, metric.root_DD, rank)
        v_RD = v_RD.to(store).to(dtype)
        cross_RD = product(v_RD, metric.gram_DD)
        # U = W C Vᵀ (V C Vᵀ)⁻¹, solved on the smaller side.
        fit_RD = solve_spd(product(cross_RD, v_RD).double(), cross_RD.double()).to(dtype)
        part = Truncated(u_mR=product(w_FD, fit_RD), v_Rn=v_RD, spectrum=spectrum)
        return _Compressed(part, [product(x, v_RD) for x in tokens.x])
    gated = [image * scale for image, scale in zip(images, tokens.scale, strict=True)]
    moment_FF = completed(_summed(gated, gated), w_FD, tokens.count)
    spectrum, vectors_FR = leading(root_F[:, None] * moment_FF * root_F, rank, dtype)
    exact_RD = product(vectors_FR.T.to(dtype), weighted_FD.T)
    v_RD = exact_RD.to(store).to(dtype)
    if torch.equal(v_RD, exact_RD) or _hides_rounding(spectrum, rank, store):
        # Then U is that of the exact V, and V x a product with the images that are there already.
        back_RF = (root_F[:, None] * vectors_FR).T.to(dtype)
        latent = [product(image, back_RF) for image in images]
        u_FR = vectors_FR / root_F[:, None]
        return _Compressed(Truncated(u_mR=u_FR, v_Rn=v_RD, spectrum=spectrum), latent)
    latent = [product(x, v_RD) for x in tokens.x]
    used = [z * scale for z, scale in zip(latent, tokens.scale, strict=True)]
    energy = 0.0
    for x, scale in zip(tokens.x, tokens.scale, strict=True):
        energy += (x * scale).square().sum().item()
    ridge = DAMPING * energy / w_FD.shape[1] if energy > 0 else 1.0
    inner_RR = _summed(used, used) + ridge * product(v_RD, v_RD).double()
    cross_RF = _summed(used, gated) + ridge * product(v_RD, w_FD).double()
    u_FR = solve_spd(inner_RR, cross_RF).T
    return _Compressed(Truncated(u_mR=u_FR, v_Rn=v_RD, spectrum=spectrum), latent)


def _hides_rounding(spectrum: torch.Tensor, rank: int, store: torch.dtype) -> bool:
    """Whether what the rank leaves out is far more than what rounding V adds."""
    return tail_share(spectrum, rank) > ROUNDING_MARGIN * torch.finfo(store).eps ** 2


def _whitened_rows(
    energy_nn: torch.Tensor, b_nn: torch.Tensor, s_nn: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """V [rank, n], the leading eigenvectors of Bᵀ energy B times S⁻¹, and that spectrum.

    It is the best row space for a weight W in the metric S Sᵀ if W S = (root of energy) B.
    """
    dtype = s_nn.dtype
    back_nn = b_nn.T.contiguous()
    spectrum, vectors_nR = leading(product(product(back_nn, energy_nn), back_nn), rank, dtype)
    v_Rn = torch.linalg.solve_triangular(s_nn, vectors_nR.T.to(dtype), upper=False, left=False)
    # Orthonormal rows: V x keeps the scale of x, and half precision its range.
    return orthonormal_rows(v_Rn), spectrum


def _followed(
    activation: Activation, tokens: _Tokens, gate: _Compressed, up: _Compressed
) -> Iterator[torch.Tensor]:
    """The gated neurons that the compressed gate and up give, chunk by chunk."""
    u_gate_FR, u_up_FR = (each.part.u_mR.to(tokens.dtype) for each in (gate, up))
    for gate_z, up_z, scale in zip(gate.latent, up.latent, tokens.scale, strict=True):
        h_nF = activation(product(gate_z, u_gate_FR))
        yield h_nF.mul_(product(up_z, u_up_FR)).mul_(scale)


def _down_narrow(
    w_DF: torch.Tensor,
    tokens: _Tokens,
    followed: Iterator[torch.Tensor] | None,
    rank: int,
    store: torch.dtype,
) -> Truncated:
    """Down for the compressed neurons h' if given, for the dense ones h otherwise.

    With C = Σ h' h'ᵀ + λ and K = Σ h h'ᵀ + λ the least-squares weight is W̃ = W2 K C⁻¹. λ, the
    weight of W2 itself, shrinks with the tokens as in `shared_basis`.
    """
    dtype, width = tokens.dtype, w_DF.shape[1]
    if followed is None:
        gram_FF = ridged(_summed(tokens.h, tokens.h), DAMPING)
        cross_FF = gram_FF
    else:
        used = list(followed)
        gram_FF = _summed(used, used)
        ridge = width / (tokens.count + width) * gram_FF.diagonal().mean().item() or 1.0
        gram_FF.diagonal().add_(ridge)
        cross_FF = _summed(tokens.h, used)
        cross_FF.diagonal().add_(ridge)
    gram, cross = gram_FF.to(dtype), cross_FF.to(dtype)
    if len(w_DF) > width:
        s_FF = cholesky(gram_FF).to(dtype)
        # W̃ S = W2 K S⁻ᵀ.
        b_FF = torch.linalg.solve_triangular(s_FF.T, cross, upper=True, left=False)
        v_RF, spectrum = _whitened_rows(inner(w_DF, w_DF).to(dtype), b_FF, s_FF, rank)
    else:
        wanted_DF = w_DF
        if followed is not None:
            wanted_DF = solve_spd(gram_FF, product(cross.T, w_DF).double()).T.to(dtype)
        moment_DD = product(product(wanted_DF, gram), wanted_DF)
        spectrum, vectors_DR = leading(moment_DD, rank, dtype)
        v_RF = product(vectors_DR.T.to(dtype), wanted_DF.T)
    v_RF = v_RF.to(store).to(dtype)
    inner_RR = product(product(v_RF, gram), v_RF).double()
    fit_RF = solve_spd(inner_RR, product(v_RF, cross).double()).to(dtype)
    return Truncated(u_mR=product(w_DF, fit_RF), v_Rn=v_RF, spectrum=spectrum)


def _down_wide(
    w_DF: torch.Tensor,
    tokens: _Tokens,
    followed: Iterator[torch.Tensor] | None,
    rank: int,
    store: torch.dtype,
) -> Truncated:
    """V for the dense neurons; U by least squares from what V makes of the compressed ones."""
    dtype, width = tokens.dtype, w_DF.shape[1]
    moment_DD = completed(_summed(tokens.y, tokens.y), w_DF, tokens.count)
    spectrum, vectors_DR = leading(moment_DD, rank, dtype)
    v_RF = product(vectors_DR.T.to(dtype), w_DF.T).to(store).to(dtype)
    if followed is None:
        # Of the rounding of V; V is not whitened, which is enough for so small a change.
        u_RD = solve_spd(product(v_RF, v_RF).double(), product(v_RF, w_DF).double())
        return Truncated(u_mR=u_RD.T, v_Rn=v_RF, spectrum=spectrum)
    size = len(w_DF)
    inner_RR = torch.zeros(rank, rank, dtype=torch.float64, device=w_DF.device)
    cross_RD = torch.zeros(rank, size, dtype=torch.float64, device=w_DF.device)
    energy = 0.0
    for h_nF, y_nD in zip(followed, tokens.y, strict=True):
        z_nR = product(h_nF, v_RF)
        inner_RR += inner(z_nR, z_nR)
        cross_RD += inner(z_nR, y_nD)
        energy += h_nF.square().sum().item()
    ridge = width / (tokens.count + width) * energy / width if energy > 0 else 1.0
    inner_RR += ridge * product(v_RF, v_RF).double()
    cross_RD += ridge * product(v_RF, w_DF).double()
    return Truncated(u_mR=solve_spd(inner_RR, cross_RD).T, v_Rn=v_RF, spectrum=spectrum)
