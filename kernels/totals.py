"""From the integers that kernels leave to rounded sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvfast.kernels.sums import LOWEST_WINDOW, WINDOW_BITS


def total(slots: Sequence[Sequence[int]], nonfinite: float) -> float:
    """One sum, rounded once to float64.

    Args:
        slots: [WINDOWS][LIMBS] of a kernel, ascending windows.
        nonfinite: IEEE sum of the non-finite addends, which is the result if there are any.
    """
    if nonfinite != 0.0:
        return nonfinite
    used = [place for place, slot in enumerate(slots) if slot[4]]
    if not used:
        return 0.0
    place = used[-1]
    high, low = _wide(slots[place][0], slots[place][1]), _wide(slots[place][2], slots[place][3])
    if place > 0:
        # One window up, a high integer is a low one, and what was low is below the grid.
        low += _wide(slots[place - 1][0], slots[place - 1][1])
    unit = WINDOW_BITS.value * (place + LOWEST_WINDOW.value - 1)
    return math.ldexp(float((high << WINDOW_BITS.value) + low), unit)


def _wide(low_bits: int, rest: int) -> int:
    return (rest << 32) + low_bits
