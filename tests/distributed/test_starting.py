"""How ranks begin and end: a store that opens late, and processes that do not put torch away."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.distributed.ranks import free_port
from tvfast.cli import main as cli
from tvfast.distributed.communicator import _until_listened


def test_a_store_that_opens_late_is_met_at_once() -> None:
    """torch's client would come back after half a second or more."""
    port, opened = free_port(), threading.Event()

    def open_late() -> None:
        time.sleep(0.2)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()[0].close()
            opened.set()

    thread = threading.Thread(target=open_late)
    thread.start()
    assert 20.0 < _until_listened("127.0.0.1", port, 30.0) < 29.9
    thread.join()
    assert opened.is_set()


def test_a_store_that_never_opens_leaves_the_rest_to_torch() -> None:
    began = time.monotonic()
    assert _until_listened("127.0.0.1", free_port(), 1.3) == pytest.approx(1.0, abs=0.1)
    assert time.monotonic() - began < 5.0
    assert _until_listened("127.0.0.1", free_port(), 0.5) == 0.5


def test_a_host_without_an_address_is_not_asked_again() -> None:
    assert _until_listened("there-is-no.invalid", 1, 30.0) > 1.0


class _Left(BaseException):
    pass


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    ("command", "size"), [("merge", "1"), ("merge", "2"), ("mergekit-yaml", "1"), ("sweep", "2")]
)
def test_only_merges_leave_at_once(
    status: int, command: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others call functions of users."""
    left: list[int] = []

    def leave(found: int) -> None:
        left.append(found)
        raise _Left

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(cli, "main", lambda: status)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(sys, "argv", ["tvfast", command, "recipe.yml"])
    if command == "sweep":
        assert cli.command() == status
        assert not left
    else:
        with pytest.raises(_Left):
            cli.command()
        assert left == [status]


def test_what_a_rank_printed_is_there_when_it_has_left() -> None:
    variables = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    prints = (
        "import atexit, sys\n"
        "from tvfast.cli import main as cli\n"
        "atexit.register(print, 'too late')\n"
        "cli.main = lambda: print('merged') or 3\n"
        "sys.argv = ['tvfast', 'merge', 'recipe.yml', 'out']\n"
        "sys.exit(cli.command())\n"
    )
    done = subprocess.run([sys.executable, "-c", prints], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "merged\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "tvfast", "merge", "missing.yml", "out"],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode in (1, 2)
    assert "missing.yml" in wrong.stderr


def test_garbage_is_collected_after_torch_was_loaded() -> None:
    assert gc.isenabled()
