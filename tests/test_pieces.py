"""Memory that is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from nlpinf.pieces import Room


def test_a_room_is_the_same_memory_until_more_is_asked_for() -> None:
    room, single, double = Room(), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    first = room.like(single, 4, 5)
    assert first.shape == (4, 5) and first.dtype == torch.float32 and first.is_contiguous()
    assert room.like(single, 3, 2).data_ptr() == first.data_ptr() == room.like(single, 20).data_ptr()
    other = room.like(double, 20)
    assert other.dtype == torch.float64 and other.data_ptr() != first.data_ptr()
    larger = room.like(single, 21)
    assert larger.shape == (21,) and room.like(single, 4, 5).data_ptr() == larger.data_ptr()
    assert room.like(single, 0, 5).shape == (0, 5)


def test_threads_have_rooms_of_their_own() -> None:
    room, one = Room(), torch.zeros(1)
    mine = room.like(one, 8).fill_(1)
    with ThreadPoolExecutor(1) as threads:
        theirs = threads.submit(lambda: room.like(one, 8).fill_(2)).result()
    assert mine.eq(1).all() and theirs.eq(2).all() and room.like(one, 8).data_ptr() == mine.data_ptr()
