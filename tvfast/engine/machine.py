"""What the machine has."""

from __future__ import annotations

import os

_LEAST = 64 * 2**20
_UNKNOWN = 4 * 2**30


def stay_cached(n_bytes: int) -> bool:
    """Whether so many bytes of files would stay in the page cache: no more than half of all memory."""
    return n_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def free_memory() -> int:
    """Bytes that new processes can use without swapping, in this machine and this control group."""
    found = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as first, open(used) as second:
                found.append(int(first.read()) - int(second.read()))
        except (OSError, ValueError):
            pass  # no control group, or one without a limit
    return max(_LEAST, min(found))


def _meminfo(key: str) -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _UNKNOWN
