"""`python -m tvfast` is the `tvfast` command."""

from __future__ import annotations

import sys

from tvfast.cli.main import command

if __name__ == "__main__":
    sys.exit(command())
