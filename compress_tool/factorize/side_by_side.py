"""Experts of one layer worked on side by side, on a CPU with several cores.

`eigh`, Cholesky and the elimination of neurons gain little from BLAS threads (their inner loops
are small), while experts are independent: with a thread for each the whole machine is busy. Results
come in the order of the experts and each is computed as it would be alone, so they do not depend on
how many there are, except for the rounding of products by more or fewer BLAS threads.

Memory: the working set of `num_workers` experts, and the results of one more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

import torch

from vllm_moesvd.format import MoEShape

Item = TypeVar("Item")
Result = TypeVar("Result")

WEIGHT_BYTES: Final = 256 * 2**20
"""fp32 weights of all experts in work: what they compute takes a few times as much. One expert of
Mixtral-8x7B is larger, and large enough to keep all BLAS threads busy by itself."""


def num_workers(shape: MoEShape, device: str = "cpu") -> int:
    """How many experts are worked on at once: at most one for each thread that torch may use."""
    if torch.device(device).type != "cpu":
        return 1
    expert_bytes = 4 * 3 * shape.expert_width * shape.hidden_size
    return max(1, min(torch.get_num_threads(), shape.num_experts, WEIGHT_BYTES // expert_bytes))


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`map(work, items)` on `workers` threads, which share torch's threads among them.

    An exception of `work` is raised here, after the items in work are done.
    """
    if workers == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
    )
    try:
        for item in items:
            if len(waiting) > workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # A new thread of torch starts with the number that was set last, by any thread.
        torch.set_num_threads(threads)
