"""Run one command and say how long it took and how much memory it held.

    python process.py COMMAND [ARGUMENT ...]

Prints one JSON object, with the command's stdout and the end of its stderr. Only the standard library is
imported: a child counts its parent's resident memory as its own peak until it executes its program, so the
parent has to be small.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

_LONGEST = 20_000  # of stderr, which progress could fill


def main() -> None:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)]
        start = time.perf_counter()
        child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    record = {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,  # Linux counts in KiB
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "status": os.waitstatus_to_exitcode(status),
        "stdout": texts[0],
        "stderr": texts[1][-_LONGEST:],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
