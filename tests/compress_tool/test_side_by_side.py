"""Experts side by side: the order of results, failures, and torch's threads afterwards."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from compress_tool.side_by_side import num_workers, one_thread, side_by_side, steady_sums
from vllm_moesvd.format import MoEShape

MIXTRAL = MoEShape(hidden_size=4096, expert_width=14336, num_experts=8, top_k=2)
FINE = MoEShape(hidden_size=2048, expert_width=768, num_experts=128, top_k=8)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_though_later_items_are_done_first(four_threads):
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(timeout=20), "item 1 is worked on beside item 0"
        if item == 1:
            second_done.set()
        return item * item

    assert list(side_by_side(work, range(9), 2)) == [item * item for item in range(9)]


def test_threads_are_shared_out_and_given_back(four_threads):
    seen = set(side_by_side(lambda _: torch.get_num_threads(), range(6), 2))
    assert seen == {2}
    inside: list[int] = []
    thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 4
    assert inside == [4], "a thread that starts later has all of them again"


def test_a_failure_is_raised_and_nothing_further_is_started(four_threads):
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item == 1:
            raise ValueError("item 1")
        return item

    with pytest.raises(ValueError, match="item 1"):
        list(side_by_side(work, range(100), 2))
    assert len(started) <= 2 + 2 + 1
    assert torch.get_num_threads() == 4


def test_one_thread_ends_with_all_of_them_though_the_work_was_left(four_threads):
    def leave() -> None:
        with one_thread("cpu") as threads, closing(side_by_side(abs, range(9), threads)) as done:
            next(done)
            raise ValueError("left")

    with pytest.raises(ValueError, match="left"):
        leave()
    assert torch.get_num_threads() == 4


def test_within_steady_sums_the_threads_are_those_taken_from_blas(four_threads):
    with steady_sums(FINE):
        assert torch.get_num_threads() == 1
        with one_thread("cpu") as threads:
            assert threads == 4
        assert torch.get_num_threads() == 1
    with steady_sums(MIXTRAL):
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4


def test_one_large_expert_has_all_threads_and_an_accelerator_one_expert(four_threads):
    assert num_workers(MIXTRAL) == 1
    assert num_workers(FINE) == 4
    assert num_workers(FINE, "cuda") == 1
    torch.set_num_threads(64)
    assert num_workers(FINE) == 14
    torch.set_num_threads(1)
    assert num_workers(FINE) == 1
