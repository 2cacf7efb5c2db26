"""Loads, stores and roundings with the same bits on a device and in Triton's interpreter.

bfloat16 travels as integers: the interpreter has no such type and truncates where it emulates one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tvfast.program import DType

F32 = tl.constexpr(int(DType.F32))
BF16 = tl.constexpr(int(DType.BF16))
F16 = tl.constexpr(int(DType.F16))
MIXED = tl.constexpr(-1)
"""A launch whose tensors have several dtypes: the one of each is read from the work table."""


@triton.jit
def load_fixed(address, i, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Elements i [n] int64 of one dtype at a scalar address, widened to float32; +0 outside."""
    address = address.to(tl.int64)  # an argument below 2^31 comes as an int32
    if DTYPE == F32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == BF16:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    pointer += i
    if MASKED:
        x = tl.load(pointer, mask=inside, other=0)
    else:
        x = tl.load(pointer)
    if DTYPE == BF16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load(address, dtype, i, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """`load_fixed`, by the scalar `dtype` in a launch of MIXED."""
    if DTYPE == MIXED:
        if dtype == F32:
            x = load_fixed(address, i, inside, F32, ALIGNED, MASKED)
        elif dtype == BF16:
            x = load_fixed(address, i, inside, BF16, ALIGNED, MASKED)
        else:
            x = load_fixed(address, i, inside, F16, ALIGNED, MASKED)
    else:
        x = load_fixed(address, i, inside, DTYPE, ALIGNED, MASKED)
    return x


@triton.jit
def rounded_bits(x, DTYPE: tl.constexpr):
    """Bit patterns of x [n] float32, rounded once to nearest even; every NaN is the quiet one."""
    bits = x.to(tl.int32, bitcast=True)
    if DTYPE == F32:
        result = tl.where(x != x, 0x7FC00000, bits)
    elif DTYPE == BF16:
        result = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        half = x.to(tl.float16).to(tl.int16, bitcast=True)
        result = tl.where(x != x, 0x7E00, half.to(tl.int32)).to(tl.int16)
    return result


@triton.jit
def store_fixed(address, i, x, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Rounds x [n] float32 into elements i [n] int64 of one dtype at a scalar address."""
    address = address.to(tl.int64)
    if DTYPE == F32:
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    pointer += i
    if MASKED:
        tl.store(pointer, rounded_bits(x, DTYPE), mask=inside)
    else:
        tl.store(pointer, rounded_bits(x, DTYPE))


@triton.jit
def store(address, dtype, i, x, inside, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """`store_fixed`, by the scalar `dtype` in a launch of MIXED."""
    if DTYPE == MIXED:
        if dtype == F32:
            store_fixed(address, i, x, inside, F32, ALIGNED, MASKED)
        elif dtype == BF16:
            store_fixed(address, i, x, inside, BF16, ALIGNED, MASKED)
        else:
            store_fixed(address, i, x, inside, F16, ALIGNED, MASKED)
    else:
        store_fixed(address, i, x, inside, DTYPE, ALIGNED, MASKED)


INTERPRETED = tl.constexpr(not isinstance(load, JITFunction))
"""Whether these kernels run in Triton's interpreter, which was decided when triton was imported."""


@triton.jit
def negative_zero(like):
    """-0 of the shape of `like` [n] float32. A literal -0.0 equals zero and would be folded to +0."""
    return tl.full(like.shape, -2147483648, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fused_add(a, b, c):
    """a * b + c rounded once, [n] float32."""
    if INTERPRETED:
        # The interpreter's fma rounds twice. The product is exact in float64; the two-sum gives the error of
        # the sum, and rounding to odd by it makes the rounding to float32 as if from the exact sum.
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        odd = (tl.abs(error) < float("inf")) & (error != 0) & ((bits & 1) == 0)
        toward = tl.where((error > 0) == (total > 0), 1, -1)
        result = tl.where(odd, bits + toward, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def magnitude_bits(x):
    """Bit patterns of |x| as int32 [n], every NaN alike: ordered as magnitudes are, NaN above infinity."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
