"""Small random layers for the kernel tests, each with its reason, and what they must compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_moesvd import reference
from vllm_moesvd.kernels.forward import Base, Factors, ShapeAndType
from vllm_moesvd.kernels.plan import LayerSizes, Plan, plan_launches
from vllm_moesvd.kernels.tiles import TileTable

E8 = tuple(range(8))


@dataclass(frozen=True, kw_only=True)
class Case:
    reason: str
    tokens: int
    expert_slot: tuple[int, ...] = E8
    slot_group: tuple[int, ...] = (0,) * 8
    top_k: int = 2
    hidden: int = 40
    width: int = 72
    rank: int = 23
    rank_down: int = 19
    skew: bool = False
    base_width: int = 0


CASES = (
    Case(reason="one token, one tile of everything", tokens=1),
    Case(reason="fewer tokens than a tile", tokens=5),
    Case(reason="every size a multiple of its tile", tokens=32, hidden=32, width=64, rank=32,
         rank_down=16),
    Case(reason="tokens, ranks and widths that no tile divides", tokens=37, hidden=41, width=67),
    Case(reason="ranks far below a tile: most of it masked", tokens=9, rank=3, rank_down=2),
    Case(reason="several routing tiles: scan and scatter", tokens=150),
    Case(reason="more routing tiles than one step of the scan", tokens=140, top_k=8, hidden=16,
         width=16, rank=16, rank_down=16, expert_slot=E8),
    Case(reason="one expert gets every token, six get none", tokens=70, skew=True),
    Case(reason="one expert per token", tokens=21, top_k=1),
    Case(reason="top-k no power of two", tokens=21, top_k=3),
    Case(reason="every expert chosen", tokens=11, top_k=8),
    Case(reason="top-k just above a power of two: most padding", tokens=5, top_k=5, hidden=24,
         width=24, rank=16, rank_down=16),
    Case(reason="top-k one below a power of two", tokens=19, top_k=7, hidden=24, width=24,
         rank=16, rank_down=16),
    Case(reason="16 experts, top 2: Phi-3.5-MoE", tokens=17, expert_slot=tuple(range(16)),
         slot_group=(0,) * 16, hidden=24, width=24, rank=17, rank_down=15),
    Case(reason="64 experts, top 6: DeepSeekMoE-16B", tokens=7, top_k=6,
         expert_slot=tuple(range(64)), slot_group=(0,) * 64, hidden=24, width=16, rank=16,
         rank_down=16),
    Case(reason="128 experts, top 8: Qwen3-30B-A3B", tokens=3, top_k=8,
         expert_slot=tuple(range(128)), slot_group=(0,) * 128, hidden=24, width=16, rank=16,
         rank_down=16),
    Case(reason="merged experts: every second of 16 shares the slot of the one before", tokens=19,
         top_k=4, expert_slot=tuple(e // 2 for e in range(16)), slot_group=(0,) * 8, hidden=24,
         width=24, rank=16, rank_down=16),
    Case(reason="a single slot: every choice merges into one", tokens=11, top_k=3,
         expert_slot=(0,) * 8, slot_group=(0,)),
    Case(reason="trimmed slots: two or more experts on one", tokens=33, top_k=4,
         expert_slot=(0, 1, 1, 2, 2, 2, 0, 1), slot_group=(0, 0, 0)),
    Case(reason="trimmed slots in several routing tiles", tokens=90, top_k=4,
         expert_slot=(0, 1, 1, 2, 2, 2, 0, 1), slot_group=(0, 0, 0)),
    Case(reason="two groups, slots in an order that is not theirs", tokens=33,
         slot_group=(1, 0, 1, 1, 0, 0, 1, 0)),
    Case(reason="groups and trimmed slots together", tokens=75, top_k=3,
         expert_slot=(0, 3, 1, 2, 2, 3, 0, 1), slot_group=(1, 0, 2, 0)),
    Case(reason="form svd: a group for each slot", tokens=33, slot_group=E8),
    Case(reason="depth long enough to be split", tokens=2, hidden=300, width=600),
    Case(reason="256 experts, top 8", tokens=3, top_k=8, expert_slot=tuple(range(256)),
         slot_group=(0,) * 256, hidden=24, width=16),
    Case(reason="256 experts in 8 groups, several routing tiles", tokens=40, top_k=8,
         expert_slot=tuple(range(256)), slot_group=tuple(e // 32 for e in range(256)),
         hidden=16, width=16, rank=16, rank_down=16),
    Case(reason="base of all neurons, one token", tokens=1, base_width=72),
    Case(reason="base of fewer neurons than any tile", tokens=9, base_width=7),
    Case(reason="base in several tiles, none of them full", tokens=75, base_width=53),
    Case(reason="many tokens, few per slot: base down has tiles of its own", tokens=40, hidden=70,
         expert_slot=tuple(range(64)), slot_group=(0,) * 64, base_width=33),
    Case(reason="base and trimmed slots: weights of its neurons are summed", tokens=33, top_k=4,
         expert_slot=(0, 1, 1, 2, 2, 2, 0, 1), slot_group=(0, 0, 0), base_width=40),
    Case(reason="base and a group for each slot: a launch of its own for base gate and up",
         tokens=33, slot_group=E8, base_width=72),
    Case(reason="base and depth long enough to be split", tokens=2, hidden=300, width=80,
         rank=13, base_width=10),
    Case(reason="base and groups, both split", tokens=2, hidden=300, slot_group=(1, 0) * 4,
         base_width=20),
)  # fmt: skip


def launches(case: Case, table: TileTable) -> Plan:
    """How the launcher will cut this case."""
    sizes = LayerSizes(
        num_tokens=case.tokens,
        top_k=case.top_k,
        hidden=case.hidden,
        width=case.width,
        r=case.rank,
        q=case.rank_down,
        num_slots=len(case.slot_group),
        num_groups=max(case.slot_group) + 1,
        base_width=case.base_width,
    )
    return plan_launches(sizes, table)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    x_TD: torch.Tensor
    index_TK: torch.Tensor
    gate_TK: torch.Tensor
    factors: Factors


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    s, g = len(case.slot_group), max(case.slot_group) + 1

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5 * 1.5).to(dtype)

    b = case.base_width
    base = Base(
        gate_BD=normal(b, case.hidden), up_BD=normal(b, case.hidden), down_DB=normal(case.hidden, b)
    ) if b else None  # fmt: skip
    scores_TE = torch.rand(case.tokens, len(case.expert_slot), generator=generator)
    if case.skew:
        scores_TE[:, 1:3] += torch.tensor([5.0, 4.0])
    gate_TK, index_TK = scores_TE.topk(case.top_k)
    return Inputs(
        x_TD=torch.randn(case.tokens, case.hidden, generator=generator).to(dtype),
        index_TK=index_TK,
        gate_TK=gate_TK,
        factors=Factors(
            v_gate_GrD=normal(g, case.rank, case.hidden),
            v_up_GrD=normal(g, case.rank, case.hidden),
            u_gate_SFR=normal(s, case.width, case.rank),
            u_up_SFR=normal(s, case.width, case.rank),
            v_down_GQF=normal(g, case.rank_down, case.width),
            u_down_SDq=normal(s, case.hidden, case.rank_down),
            base=base,
        ),
    )


def moved(factors: Factors, device: str) -> Factors:
    """The same layer on another device."""

    def tensors(of: Base | Factors) -> dict[str, torch.Tensor]:
        values = {name: getattr(of, name) for name in type(of).__dataclass_fields__}
        return {n: v.to(device) for n, v in values.items() if isinstance(v, torch.Tensor)}

    base = None if factors.base is None else Base(**tensors(factors.base))
    return Factors(**tensors(factors), base=base)


def expected(case: Case, given: Inputs) -> torch.Tensor:
    f = given.factors
    return reference.factored_experts(
        given.x_TD,
        given.index_TK,
        given.gate_TK,
        v_gate_GRD=f.v_gate_GrD,
        v_up_GRD=f.v_up_GrD,
        v_down_GQF=f.v_down_GQF,
        u_gate_SFR=f.u_gate_SFR,
        u_up_SFR=f.u_up_SFR,
        u_down_SDQ=f.u_down_SDq,
        expert_slot=case.expert_slot,
        slot_group=case.slot_group,
        base_gate_BD=f.base.gate_BD if f.base else None,
        base_up_BD=f.base.up_BD if f.base else None,
        base_down_DB=f.base.down_DB if f.base else None,
    )


def poisoned(*wanted: ShapeAndType) -> list[torch.Tensor]:
    poison = {torch.int32: -(2**30)}
    return [torch.full(shape, poison.get(t, float("nan")), dtype=t) for shape, t in wanted]


@dataclass(frozen=True, kw_only=True)
class JoinedCase:
    """Matrices that multiply the same tokens: router, V, gate and up of shared experts, a gate."""

    reason: str
    tokens: int
    columns: tuple[int, ...]
    hidden: int = 40
    wide_logits: bool = False

    def out_dtype(self, index: int, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.wide_logits and index == 0 else dtype


JOINED_CASES = (
    JoinedCase(reason="one token, every tile masked", tokens=1, columns=(8, 23)),
    JoinedCase(reason="a rank that no tile divides", tokens=3, columns=(8, 50), hidden=67),
    JoinedCase(reason="every size a multiple of its tile", tokens=16, columns=(16, 32), hidden=256),
    JoinedCase(reason="as many experts as ranks", tokens=16, columns=(8, 8)),
    JoinedCase(reason="one matrix: the model keeps its router", tokens=5, columns=(37,)),
    JoinedCase(reason="one token more than a block", tokens=17, columns=(60, 37), hidden=300),
    JoinedCase(reason="60 experts and a shared expert with its gate: Qwen1.5-MoE", tokens=33,
               columns=(60, 37, 50, 1)),
    JoinedCase(reason="the same, one token", tokens=1, columns=(60, 37, 50, 1), hidden=512),
    JoinedCase(reason="256 experts, fp32 logits, shared experts: DeepSeek-V3", tokens=64,
               columns=(256, 45, 64), hidden=128, wide_logits=True),
    JoinedCase(reason="the same, one token", tokens=1, columns=(256, 45, 64), wide_logits=True),
    JoinedCase(reason="fp32 logits beside V alone", tokens=64, columns=(8, 70), hidden=130,
               wide_logits=True),
)  # fmt: skip


def joined_inputs(case: JoinedCase, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype)
    scale = case.hidden**-0.5
    weights = [torch.randn(c, case.hidden, generator=generator) * scale for c in case.columns]
    return x_TD, [weight.to(dtype) for weight in weights]
