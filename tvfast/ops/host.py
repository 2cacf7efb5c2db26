"""Services over host memory given by its address: checksums, and a search for values that are not finite."""

from __future__ import annotations

import tvfast._C_cpu as _C_cpu
from tvfast.program import DType


def crc32c(address: int, n_bytes: int, seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of `n_bytes` at `address`, as a number below 2^32.

    Args:
        seed: the checksum of what comes before; `crc32c(b, seed=crc32c(a))` is that of a and b end to end.

    Notes:
        The processor's instruction where it has one, on the calling thread, without the interpreter's lock.

    Source: RFC 3720, appendix B.4.
    """
    return int(_C_cpu.crc32c(address, n_bytes, seed))


def crc32c_combine(a: int, b: int, n_bytes_b: int) -> int:
    """The checksum of two pieces end to end, from that of each and the length of the second."""
    return int(_C_cpu.crc32c_combine(a, b, n_bytes_b))


def first_nonfinite(address: int, n_elements: int, dtype: DType) -> int:
    """Index of the first infinity or NaN, or -1; any alignment, without the interpreter's lock."""
    return int(_C_cpu.first_nonfinite(address, n_elements, int(dtype)))
