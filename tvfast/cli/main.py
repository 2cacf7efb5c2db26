"""Entry point of the `tvfast` command. Subcommands import what they need, so `--help` stays light.

Exit status: 0 done, 1 the job failed, 2 usage or configuration, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import tvfast
from tvfast.cli import (
    bench,
    collect,
    demo,
    doctor,
    extract_lora,
    inspect,
    merge,
    mergekit_yaml,
    methods,
    plan,
    sweep,
)
from tvfast.cli.signals import INTERRUPTED, Stopped
from tvfast.errors import ArgumentError, RecipeError, TvfastError, UnknownNameError

_FAILED, _USAGE = 1, 2
_COMMANDS = (
    merge,
    mergekit_yaml,
    plan,
    inspect,
    sweep,
    collect,
    extract_lora,
    methods,
    doctor,
    bench,
    demo,
)


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    top = argparse.ArgumentParser(
        prog="tvfast", description="Fast merging of large language model checkpoints with task arithmetic."
    )
    top.add_argument("--version", action="version", version=f"tvfast {tvfast.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status. An error is one message on stderr."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # θ on a terminal of another encoding, or a path that is no text
        sys.stdout.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except TvfastError as error:
        return _complain(error, _USAGE if _is_configuration(error) else _FAILED)
    except ImportError as error:
        return _complain(error, _FAILED)
    except BrokenPipeError:
        # the reader left, for instance `head`; without this, Python complains again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", _FAILED)
    except MemoryError:
        return _complain("out of memory. Pass --memory, or close other programs.", _FAILED)
    except Stopped as stop:
        return _complain(stop, stop.status)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        return _internal(error)


def command() -> int:
    """`main` as a process of its own; a merge of checkpoints ends in here.

    Putting objects away takes 0.04 s, and a quarter of a second where there is torch, as in ranks, for which
    others may wait. The output is on the disk by now, and the other ranks know that this one has left. Other
    commands call functions of users, whose packages may have something to do at the end.

    Python looks for unreachable objects whenever there are 700 more; while hundreds of thousands come with
    imports and headers, and stay, that is a third of the time until a merge begins.
    """
    gc.set_threshold(100_000)
    status = main()
    if sys.argv[1:2] in (["merge"], ["mergekit-yaml"]):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _is_configuration(error: TvfastError) -> bool:
    """Whether what was asked for is wrong, rather than a file: shapes and dtypes are those of files."""
    return isinstance(error, RecipeError | UnknownNameError) or type(error) is ArgumentError


def _complain(message: object, status: int) -> int:
    print(f"tvfast: error: {message}", file=sys.stderr)
    return status


def _internal(error: Exception) -> int:
    """A defect of tvfast itself: where it is on one line, the whole story only when asked for."""
    if os.environ.get("TVFAST_DEBUG") == "1":
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
    text = " ".join(str(error).split())
    return _complain(
        f"internal error in {place}: {type(error).__name__}: {text[:400]}. This is a defect of tvfast; "
        "please report it with the output under TVFAST_DEBUG=1.",
        _FAILED,
    )
