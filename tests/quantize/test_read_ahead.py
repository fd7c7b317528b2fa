"""Experts' weights come in order, each read while the one before is used."""

from __future__ import annotations

import threading

import pytest
import torch

from quantize.calibration.read_ahead import experts_in_order, read_ahead


def test_one_is_read_while_the_one_before_is_used() -> None:
    begun = [threading.Event() for _ in range(5)]
    threads = set()

    def read(number: int) -> int:
        threads.add(threading.get_ident())
        begun[number].set()
        return 10 * number

    for number, found in enumerate(read_ahead(read, 4)):
        assert found == 10 * number
        if number < 3:
            assert begun[number + 1].wait(10), "the next is not read meanwhile"
        # No further: each that waits takes memory.
        assert not any(event.is_set() for event in begun[number + 2 :])
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(read_ahead(read, 0)) == []


def test_an_error_comes_when_it_is_its_turn() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise OSError("file is gone")
        return number

    found = []
    with pytest.raises(OSError, match="file is gone"):
        for number in read_ahead(read, 4):
            found.append(number)
    assert found == [0, 1]


def test_who_stops_leaves_no_thread() -> None:
    before = threading.active_count()
    for number in read_ahead(lambda number: number, 100):
        if number == 3:
            break
    assert threading.active_count() == before


def test_processors_read_one_by_one() -> None:
    """All of their cores are at work; memory is reckoned for one expert."""
    here = threading.get_ident()
    read = experts_in_order(lambda _: threading.get_ident(), 3, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    assert list(read) == [here] * 3
