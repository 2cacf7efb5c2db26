"""`python -m bench.gpu`: see `suite`."""

from __future__ import annotations

from bench.gpu.suite import main

if __name__ == "__main__":
    raise SystemExit(main())
