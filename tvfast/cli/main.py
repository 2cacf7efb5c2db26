"""Entry point of the `tvfast` command. Subcommands import what they need, so `--help` stays light.

Exit status: 0 done, 1 the job failed, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import tvfast
from tvfast.cli import demo, doctor, methods
from tvfast.errors import TvfastError, UnknownNameError

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    top = argparse.ArgumentParser(
        prog="tvfast", description="Fast merging of large language model checkpoints with task arithmetic."
    )
    top.add_argument("--version", action="version", version=f"tvfast {tvfast.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, methods, doctor):
        module.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status. An error is one message on stderr."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except UnknownNameError as error:
        return _complain(error, _USAGE)
    except (TvfastError, ImportError) as error:
        return _complain(error, _FAILED)
    except BrokenPipeError:
        # the reader left, for instance `head`; without this, Python complains again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", _FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)


def _complain(message: object, status: int) -> int:
    print(f"tvfast: error: {message}", file=sys.stderr)
    return status
