"""Experts of one layer, or sequences, worked on side by side, on a CPU with several cores.

`eigh`, Cholesky and the elimination of neurons gain little from BLAS threads (their inner loops
are small), while experts are independent: with a thread for each the whole machine is busy. Results
come in the order of the experts and each is computed as it would be alone, so they do not depend on
how many there are. Within `steady_sums` nothing else depends on the number of threads either.

Memory: the working set of `num_workers` experts, and the results of one more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

import torch

from vllm_moesvd.format import MoEShape

Item = TypeVar("Item")
Result = TypeVar("Result")

WEIGHT_BYTES: Final = 256 * 2**20
"""fp32 weights of all experts in work: what they compute takes a few times as much. One expert of
Mixtral-8x7B is larger, and large enough to keep all BLAS threads busy by itself."""

_threads: ContextVar[int | None] = ContextVar("moesvd_threads", default=None)
"""How many threads there are, where `steady_sums` has taken them from BLAS."""


def num_workers(shape: MoEShape, device: str = "cpu") -> int:
    """How many experts are worked on at once: at most one for each thread that torch may use."""
    if torch.device(device).type != "cpu":
        return 1
    expert_bytes = 4 * 3 * shape.expert_width * shape.hidden_size
    return max(1, min(_num_threads(), shape.num_experts, WEIGHT_BYTES // expert_bytes))


def is_steady(shape: MoEShape, device: str = "cpu") -> bool:
    """Whether `steady_sums` takes BLAS's threads from it: on a CPU, unless experts are large."""
    fits = 4 * 3 * shape.expert_width * shape.hidden_size <= WEIGHT_BYTES
    return torch.device(device).type == "cpu" and fits


@contextmanager
def steady_sums(shape: MoEShape, device: str = "cpu") -> Iterator[None]:
    """Give BLAS one thread, and the others to `side_by_side`, unless experts are too large for it.

    BLAS cuts a product differently for each number of threads, which moves its last bits, and a
    truncation takes what moved a hundred to a thousand times as far where singular values lie
    close together. Experts above WEIGHT_BYTES keep all threads, and with them those last bits.
    """
    if not is_steady(shape, device) or _threads.get() is not None:
        yield
        return
    with one_thread(device) as threads:
        token = _threads.set(threads)
        try:
            yield
        finally:
            _threads.reset(token)


@contextmanager
def one_thread(device: str | torch.device) -> Iterator[int]:
    """Give BLAS one thread on a CPU; yields how many threads there are for other work.

    For other devices, which take one piece of work after the other, that is 1. Within `steady_sums`
    it is what that has taken from BLAS.
    """
    if torch.device(device).type != "cpu":
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _threads.get() or before
    finally:
        torch.set_num_threads(before)


def _num_threads() -> int:
    return _threads.get() or torch.get_num_threads()


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """`map(work, items)` on `workers` threads, which share torch's threads among them.

    An exception of `work` is raised here, after the items in work are done.
    """
    if workers == 1:
        yield from map(work, items)
        return
    before = torch.get_num_threads()
    threads_each = max(1, before // workers)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads_each,))
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
        torch.set_num_threads(before)
