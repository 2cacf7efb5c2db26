"""Order-independent sums of float64 addends: `docs/numerics.md`, "Sums"."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

WINDOW_BITS = 40
_CHUNK = 1 << 22  # addends whose 40-bit halves cannot overflow an int64 sum


def window_of(magnitude: float) -> int:
    """Window of a positive finite number: floor(E / 40), magnitude = f * 2^E with 0.5 <= f < 1."""
    return math.frexp(magnitude)[1] // WINDOW_BITS


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    # Two factors: one alone leaves the float64 range for sums of numbers near its ends.
    half = exponent // 2
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


class ExactSum:
    """A binned sum in two passes: `observe` every addend, then `add` every addend again, in any order.

    Two passes keep this text simple: the first fixes the window, so that the second rounds once.
    """

    def __init__(self) -> None:
        self._largest = 0.0
        self._nonfinite = 0.0
        self._total = 0  # in units of 2^(40(J - 1))

    def observe(self, addends: Tensor) -> None:
        """Takes addends, float64 [n], into the choice of the window."""
        finite = torch.isfinite(addends)
        self._nonfinite += float(addends[~finite].sum())
        if bool(finite.any()):
            self._largest = max(self._largest, float(addends[finite].abs().max()))

    def add(self, addends: Tensor) -> None:
        """Adds addends, float64 [n], that were all observed."""
        if self._largest == 0.0:
            return
        unit = WINDOW_BITS * (window_of(self._largest) - 1)
        for start in range(0, addends.numel(), _CHUNK):
            chunk = addends[start : start + _CHUNK]
            finite = torch.where(torch.isfinite(chunk), chunk, torch.zeros_like(chunk))
            multiple = _times_power_of_two(finite, -unit).round()  # half to even
            high = torch.floor(multiple * 2.0**-WINDOW_BITS)
            low = multiple - high * 2.0**WINDOW_BITS
            self._total += int(high.to(torch.int64).sum()) << WINDOW_BITS
            self._total += int(low.to(torch.int64).sum())

    def value(self) -> float:
        """The sum, rounded once; non-finite if an addend is."""
        if self._nonfinite != 0.0 or self._largest == 0.0:
            return self._nonfinite
        unit = WINDOW_BITS * (window_of(self._largest) - 1)
        try:
            return float(Fraction(self._total) * Fraction(2) ** unit)
        except OverflowError:
            return math.copysign(math.inf, self._total)


class BinnedSum:
    """The same sum in one pass, for addends that are not at hand twice; as csrc/core/accumulate.hpp."""

    def __init__(self) -> None:
        self._window: int | None = None
        self._high = 0  # in units of 2^(40 J)
        self._low = 0  # in units of 2^(40 (J - 1))
        self._nonfinite = 0.0

    def add(self, addends: Tensor) -> None:
        """Adds float64 addends of any shape."""
        for start in range(0, addends.numel(), _CHUNK):
            chunk = addends.reshape(-1)[start : start + _CHUNK]
            finite = torch.isfinite(chunk)
            self._nonfinite += float(chunk[~finite].sum())
            chunk = torch.where(finite, chunk, torch.zeros_like(chunk))
            largest = float(chunk.abs().max())
            if largest > 0.0:
                self._raise(window_of(largest))
                self._add_finite(chunk)

    def state(self) -> tuple[int | None, int, int, float]:
        """(window, high total, low total, sum of the addends that are not finite)."""
        return self._window, self._high, self._low, self._nonfinite

    def value(self) -> float:
        """The sum, rounded once; non-finite if an addend is."""
        if self._nonfinite != 0.0 or self._window is None:
            return self._nonfinite
        total = (self._high << WINDOW_BITS) + self._low
        return float(Fraction(total) * Fraction(2) ** (WINDOW_BITS * (self._window - 1)))

    def _raise(self, window: int) -> None:
        if self._window is None:
            self._window = window
        if window > self._window:
            # what was high is low one window up, and what was low is below the grid
            self._low = self._high if window == self._window + 1 else 0
            self._high, self._window = 0, window

    def _add_finite(self, chunk: Tensor) -> None:
        assert self._window is not None
        unit = WINDOW_BITS * self._window
        high = _times_power_of_two(chunk, -unit).round()  # half to even
        rest = chunk - _times_power_of_two(high, unit)
        low = _times_power_of_two(rest, WINDOW_BITS - unit).round()
        self._high += int(high.to(torch.int64).sum())
        self._low += int(low.to(torch.int64).sum())
