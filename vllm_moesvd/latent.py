"""The shared V and Q of a `latent` layer, as the transforms that vLLM's runner applies.

V comes before the experts, together with what else multiplies x (`latent_runner.py`), Q after. Both
matrices are split over the rank dimension: V by rows, then an all-gather of z; Q by columns, after
a reduce-scatter of the experts' partial sums. Q's partial products are summed by the runner's own
final all-reduce. With `replicate` both are whole in every process and neither exchange happens;
where nothing but the experts is summed, the runner then all-reduces before Q instead of after.
"""

from __future__ import annotations

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader


def latent_input(
    hidden_size: int, rank: int, *, dtype: torch.dtype | None, prefix: str, replicate: bool
) -> torch.nn.Module:
    """V [rank, hidden_size] as a linear layer; `rank` must be a multiple of the TP size."""
    linear: torch.nn.Module = ColumnParallelLinear(
        hidden_size,
        rank,
        bias=False,
        gather_output=True,
        params_dtype=dtype,
        prefix=prefix,
        return_bias=False,
        disable_tp=replicate,
    )
    return linear


class LatentOutput(torch.nn.Module):
    """Q and the optional bias: partial sums [T, rank] in, partial sums [T, hidden_size] out."""

    def __init__(
        self,
        rank: int,
        hidden_size: int,
        *,
        has_bias: bool,
        dtype: torch.dtype | None,
        prefix: str,
        replicate: bool,
        reduces_late: bool = True,
    ) -> None:
        """`reduces_late` is needed unless `replicate`, and where something else is to be summed."""
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.is_sharded = self.tp_size > 1 and not replicate
        # Tells the runner not to all-reduce before, but once after this module: the sum over the
        # processes of what it returns is the transform of the sum of what it is given. With Q
        # whole everywhere and nothing to add, it reduces before: `rank` numbers a token, not
        # `hidden_size`.
        self.reduce_commutative = reduces_late
        self.project = RowParallelLinear(
            rank,
            hidden_size,
            bias=False,
            params_dtype=dtype,
            reduce_results=False,
            prefix=f"{prefix}.project",
            return_bias=False,
            disable_tp=replicate,
        )
        if has_bias:
            bias_D = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype), requires_grad=False)
            load = _load_bias_once if reduces_late else default_weight_loader
            bias_D.weight_loader = load  # type: ignore[attr-defined]
            self.bias_D: torch.nn.Parameter | None = bias_D
        else:
            self.bias_D = None

    def forward(self, partial_TR: torch.Tensor) -> torch.Tensor:
        if self.is_sharded:
            # One copy here; over the last dimension vLLM would make two, both of them transposed.
            shards_CTr = partial_TR.reshape(len(partial_TR), self.tp_size, -1).transpose(0, 1)
            partial_TR = tensor_model_parallel_reduce_scatter(
                shards_CTr.flatten(0, 1).contiguous(), dim=0
            )
        partial_TD: torch.Tensor = self.project(partial_TR)
        return partial_TD if self.bias_D is None else partial_TD + self.bias_D


def _load_bias_once(param: torch.nn.Parameter, bias_D: torch.Tensor) -> None:
    """Keep the bias in the first process only: the final all-reduce sums all of them.

    vLLM's weight reload binds the argument `param` anew, by this name.
    """
    if get_tensor_model_parallel_rank() == 0:
        param.data.copy_(bias_D)
    else:
        param.data.zero_()
