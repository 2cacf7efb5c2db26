"""Who is lost, by the clock of the one who watches."""

from __future__ import annotations

from tvfast.distributed.heartbeats import Beat, Heartbeats


def test_a_rank_that_never_comes_and_one_that_stops() -> None:
    watched = Heartbeats([1, 2], timeout_s=10.0, stall_s=0.0)
    beat = Beat()
    for now in (0.0, 5.0, 9.0):
        watched.heard(1, beat.next().pack().encode(), now)
        watched.heard(2, None, now)
        assert watched.lost(now) is None
    watched.heard(1, beat.next().pack().encode(), 11.0)
    assert watched.lost(11.0) == (2, "has not come within 10 s")
    again = Heartbeats([1], timeout_s=10.0, stall_s=0.0)
    again.heard(1, beat.pack().encode(), 0.0)
    again.heard(1, beat.pack().encode(), 9.0)
    assert again.lost(9.0) is None
    assert again.lost(10.5) == (1, "is lost: it has given no sign for 10 s")


def test_a_steady_rank_must_move_bytes_and_one_that_left_nothing() -> None:
    watched = Heartbeats([1], timeout_s=10.0, stall_s=30.0)
    beat = Beat()
    beat.steady = True
    beat.add(100, 40)
    assert watched.heard(1, beat.next().pack().encode(), 0.0) == (100, 40)
    beat.add(7, 0)
    assert watched.heard(1, beat.next().pack().encode(), 5.0) == (7, 0)
    for now in range(6, 36):
        watched.heard(1, beat.next().pack().encode(), float(now))
        assert watched.lost(float(now)) is None
    watched.heard(1, beat.next().pack().encode(), 36.0)
    assert watched.lost(36.0) == (1, "hangs: it has neither read nor written anything for 30 s")
    beat.left = True
    watched.heard(1, beat.pack().encode(), 37.0)
    assert watched.lost(1000.0) is None
