"""Torch's number of threads while models generate: nested, overlapping and failing uses restore what was there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from transformers_kt.integration.torch_threads import one_torch_thread


def in_new_thread(call: Callable[[], int]) -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(call()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_only_the_thread_that_asks_is_changed() -> None:
    with one_torch_thread():
        assert torch.get_num_threads() == 1
        assert in_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3


def test_nested_uses_restore_one_by_one() -> None:
    with one_torch_thread():
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        assert in_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3


def test_a_thread_with_a_number_of_its_own_gets_it_back_and_others_are_not_told() -> None:
    def own() -> int:
        with one_torch_thread():
            pass
        return torch.get_num_threads()

    def own_after_setting() -> int:
        torch.set_num_threads(2)
        torch_default.append(in_new_thread(torch.get_num_threads))
        return own()

    torch_default: list[int] = []
    assert in_new_thread(own) == 3
    assert in_new_thread(own_after_setting) == 2
    assert in_new_thread(torch.get_num_threads) == torch_default[0]
    assert torch.get_num_threads() == 3


def test_eight_threads_that_overlap_and_fail_leave_what_was_there() -> None:
    found: list[int] = []
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        barrier.wait()
        for step in range(10):
            with pytest.raises(KeyError) if (index + step) % 2 else one_torch_thread(), one_torch_thread():
                found.append(torch.get_num_threads())
                if (index + step) % 2:
                    raise KeyError(index)
        found.append(torch.get_num_threads() - 2)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * (8 * 11)
    assert in_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3
