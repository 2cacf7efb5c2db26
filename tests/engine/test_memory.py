"""Buffers within a budget."""

from __future__ import annotations

import threading

import pytest

from tvfast.engine.memory import PAGE, Arena, Slots

MiB = 2**20


def test_a_block_is_page_aligned_and_at_least_as_large_as_asked() -> None:
    arena = Arena(8 * MiB)
    for n_bytes in (1, PAGE, PAGE + 1, MiB + 5):
        with arena.acquire(n_bytes) as block:
            assert block.address % PAGE == 0
            assert len(block.view) == block.n_bytes >= n_bytes
            block.view[n_bytes - 1] = 7
    arena.close()


def test_blocks_do_not_overlap_and_memory_is_used_again() -> None:
    arena = Arena(8 * MiB)
    blocks = [arena.acquire(MiB) for _ in range(8)]
    assert [block.address - arena.address for block in blocks] == [k * MiB for k in range(8)]
    for k in (5, 2, 4, 3):  # in any order, neighbours become one range again
        blocks[k].release()
    with arena.acquire(4 * MiB) as large:
        assert large.address == blocks[2].address
    arena.close()


def test_who_asks_for_too_much_waits_until_there_is_room() -> None:
    arena = Arena(4 * MiB)
    first = arena.acquire(3 * MiB)
    got = threading.Event()

    def ask() -> None:
        with arena.acquire(2 * MiB):
            got.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert not got.wait(0.05)
    first.release()
    assert got.wait(10)
    thread.join()
    arena.close()


def test_more_than_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="arena of 4096"):
        Arena(4096).acquire(5000)


def test_slots_are_disjoint_parts_of_their_block() -> None:
    arena = Arena(MiB)
    with arena.acquire(MiB) as block:
        slots = Slots(block, 4)
        found = [slots.acquire() for _ in range(4)]
        assert sorted(s.address - block.address for s in found) == [k * MiB // 4 for k in range(4)]
        found[2].release()
        assert slots.acquire() is found[2]
    arena.close()
