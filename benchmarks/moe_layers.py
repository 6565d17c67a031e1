"""The routed experts of four models, and what one process holds of them in each form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from vllm_moesvd.kernels.plan import LayerSizes

Form = Literal["shared-v", "svd", "base-delta"]
FORMS: Final[tuple[Form, ...]] = ("shared-v", "svd", "base-delta")
Sharding = Literal["split", "replicate", "experts"]
"""How processes share a layer: `split` is what `layer.py` does, `replicate` its option of the same
name; `experts` gives each process whole experts and every shared V (`--enable-expert-parallel`)."""
SHARDINGS: Final[tuple[Sharding, ...]] = ("split", "replicate", "experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The routed experts of one layer, from the model's config.json."""

    name: str
    hidden_size: int
    expert_width: int
    num_experts: int
    top_k: int

    def ranks(self, removed: float, form: Form = "shared-v") -> tuple[int, int]:
        """Ranks of gate and up, and of down: the same share of `D` and of `F`, or of both for svd.

        `removed` is the share of the routed experts' parameters; ranks are multiples of 64. A base
        is as wide as the experts, and the rest is form `shared-v` with one group.
        """
        d, f, e = self.hidden_size, self.expert_width, self.num_experts
        kept = (1 - removed) * 3 * e * d * f
        if form == "svd":
            rank = int(kept / (3 * e * (d + f))) // 64 * 64
            return rank, rank
        if form == "base-delta":
            kept -= 3 * d * f
        share = kept / (2 * d * d + f * f + 3 * e * d * f)
        return int(share * d) // 64 * 64, int(share * f) // 64 * 64

    @property
    def dense_numbers(self) -> int:
        return 3 * self.num_experts * self.hidden_size * self.expert_width

    def used_experts(self, tokens: int) -> float:
        """How many experts a batch uses if routing is uniform; exact for one token."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


MODELS: Final = (
    Model(name="Mixtral-8x7B", hidden_size=4096, expert_width=14336, num_experts=8, top_k=2),
    Model(name="Phi-3.5-MoE", hidden_size=4096, expert_width=6400, num_experts=16, top_k=2),
    Model(name="DeepSeek-V3", hidden_size=7168, expert_width=2048, num_experts=256, top_k=8),
    Model(name="Qwen3-30B-A3B", hidden_size=2048, expert_width=768, num_experts=128, top_k=8),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One process's share of a compressed layer, in the numbers that its kernels see."""

    model: Model
    form: Form
    sizes: LayerSizes
    big_r: int
    big_q: int
    inner_tp: int
    """Processes among which z is gathered and w scattered."""

    @property
    def used(self) -> float:
        """Experts of this process that a batch uses."""
        share = self.sizes.num_slots / self.model.num_experts
        return share * self.model.used_experts(self.sizes.num_tokens)

    @property
    def used_groups(self) -> float:
        return self.used if self.form == "svd" else 1.0

    @property
    def pairs(self) -> float:
        """Routed rows of this process, if routing is uniform."""
        return self.sizes.num_pairs * self.sizes.num_slots / self.model.num_experts


def layer(
    model: Model, form: Form, *, removed: float, tokens: int, tp_size: int, sharding: Sharding
) -> Layer:
    big_r, big_q = model.ranks(removed, form)
    inner = tp_size if sharding == "split" else 1
    f_shards = 1 if sharding == "experts" else tp_size
    slots = -(-model.num_experts // tp_size) if sharding == "experts" else model.num_experts
    width = -(-model.expert_width // f_shards)
    sizes = LayerSizes(
        num_tokens=tokens,
        top_k=model.top_k,
        hidden=model.hidden_size,
        width=width,
        r=-(-big_r // inner),
        q=big_q,
        num_slots=slots,
        num_groups=slots if form == "svd" else 1,
        base_width=width if form == "base-delta" else 0,
    )
    return Layer(model=model, form=form, sizes=sizes, big_r=big_r, big_q=big_q, inner_tp=inner)


def weight_numbers(part: Layer, *, used: float, used_groups: float) -> float:
    """Numbers of so many slots and groups, and of the base."""
    s, q = part.sizes, -(-part.big_q // part.inner_tp)
    per_group = 2 * s.r * s.hidden + part.big_q * s.width
    per_slot = 2 * s.width * part.big_r + s.hidden * q
    return used_groups * per_group + used * per_slot + 3 * s.base_width * s.hidden
