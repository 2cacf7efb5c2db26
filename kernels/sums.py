"""Order-independent sums of a program instance: `docs/adr/0003`.

A tile keeps a window and two integers for each sum and adds them to that window's slot; the host merges the
slots by the accumulator's own rule, which does not depend on the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

WINDOW_BITS = tl.constexpr(40)
LOWEST_WINDOW = tl.constexpr(-8)  # of 2^-298, the smallest product of two float32
WINDOWS = tl.constexpr(16)
LIMBS = tl.constexpr(5)  # high and low integer, each as 32 low bits and the rest; whether the slot is used
NO_WINDOW = tl.constexpr(-1000)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, float64; -1022 <= exponent <= 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(x):
    """To the nearest integer, halves to even, for |x| < 2^51; float64."""
    magic = 6755399441055744.0  # 1.5 * 2^52
    return (x + magic) - magic


@triton.jit
def take(windows, highs, lows, nonfinites, slot, addends, S: tl.constexpr):
    """Adds float64 addends of any shape to the sum of number `slot` among S states."""
    at = tl.arange(0, S) == slot
    magnitude = tl.abs(addends)
    finite = magnitude < float("inf")
    nonfinites += tl.where(at, tl.sum(tl.where(finite, 0.0, addends)), 0.0)
    x = tl.where(finite, addends, 0.0)
    largest = tl.max(tl.where(finite, magnitude, 0.0))
    # magnitude = f * 2^exponent with 0.5 <= f < 1; never subnormal in float64
    exponent = (largest.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022
    window = (exponent - LOWEST_WINDOW * WINDOW_BITS) // WINDOW_BITS + LOWEST_WINDOW
    # Without an addend but zeros the integers below are zero in any window.
    window = tl.where(largest > 0, window, LOWEST_WINDOW)
    taken = tl.where(largest > 0, window, NO_WINDOW)
    high = _rounded(x * _power_of_two(window * -WINDOW_BITS))
    rest = x - high * _power_of_two(window * WINDOW_BITS)
    low = _rounded(rest * _power_of_two((window - 1) * -WINDOW_BITS))
    block_window = tl.where(at, taken, NO_WINDOW)
    block_high = tl.where(at, tl.sum(high.to(tl.int64)), 0)
    block_low = tl.where(at, tl.sum(low.to(tl.int64)), 0)
    raised = tl.maximum(windows, block_window)
    old, new = raised - windows, raised - block_window
    lows = tl.where(old == 0, lows, tl.where(old == 1, highs, 0)) + tl.where(
        new == 0, block_low, tl.where(new == 1, block_high, 0)
    )
    highs = tl.where(old == 0, highs, 0) + tl.where(new == 0, block_high, 0)
    return raised, highs, lows, nonfinites


@triton.jit
def add_sums(
    limbs,  # [n_entries, S, WINDOWS, LIMBS] int64
    nonfinite_sums,  # [n_entries, S] float64
    entry,
    windows, highs, lows, nonfinites,
    S: tl.constexpr,
):  # fmt: skip
    """Adds the S states of a program instance to the slots of an entry."""
    sums = tl.arange(0, S)
    used = windows > NO_WINDOW
    slots = limbs + ((entry * S + sums) * WINDOWS + tl.where(used, windows - LOWEST_WINDOW, 0)) * LIMBS
    tl.atomic_add(slots, highs & 0xFFFFFFFF, mask=used)
    tl.atomic_add(slots + 1, highs >> 32, mask=used)
    tl.atomic_add(slots + 2, lows & 0xFFFFFFFF, mask=used)
    tl.atomic_add(slots + 3, lows >> 32, mask=used)
    tl.atomic_or(slots + 4, used.to(tl.int64), mask=used)
    tl.atomic_add(nonfinite_sums + entry * S + sums, nonfinites, mask=nonfinites != 0)
