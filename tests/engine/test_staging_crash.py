"""Runs that are killed, at every step of a commit and anywhere else, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.staged import (
    COMPANIONS,
    IDENTITY,
    begin,
    contents,
    expected,
    files_in,
    folder_in_memory,
    is_model,
    merge,
    points,
    small_layout,
    units_of,
    write_units,
)
from tvfast.checkpoint.layout import Layout
from tvfast.engine.journal import RECORD_BYTES, Journal, Record
from tvfast.engine.staging import Staging
from tvfast.errors import MergeError, OutputError
from tvfast.ops.host import crc32c

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "fdatasync", "open", "pwrite", "ftruncate")


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


class Clock:
    """Counts system calls that change files; the one with number `end` is not made any more."""

    def __init__(self, patch: pytest.MonkeyPatch, end: int | None = None) -> None:
        self.now = 0
        self.end = end
        for name in STEPS:
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            if self.now == self.end:
                raise Killed
            self.now += 1
            return call(*args, **kwargs)

        return step


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as folder:
        yield folder / "out"


def visible(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_in(out).items() if not name.startswith(".tvfast")}


def stage(out: Path, layout: Layout, *, overwrite: bool) -> Staging:
    """Everything is written; only the commit is missing."""
    staging = Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=overwrite)
    write_units(staging, contents(layout), units_of(layout))
    for name, data in COMPANIONS.items():
        staging.add_file(name, data)
    return staging


def commit_until(staging: Staging, end: int | None) -> int:
    """Commits, up to a number of system calls; returns how many were made."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch, end)
        try:
            staging.commit()
        except Killed:
            assert end is not None
        return clock.now


@pytest.mark.parametrize("n_old", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("n_new", [1, 3])
def test_a_commit_may_be_killed_anywhere(out: Path, n_old: int, n_new: int) -> None:
    old, new = small_layout(n_old, "old"), small_layout(n_new)
    before, after = {}, expected(new)

    def prepare() -> Staging:
        shutil.rmtree(out, ignore_errors=True)
        if n_old:
            merge(out, old, seed=1)
            before.update(files_in(out))
        return stage(out, new, overwrite=n_old > 0)

    with prepare() as staging:
        n_steps = commit_until(staging, None)
    after["tvfast_manifest.json"] = files_in(out)["tvfast_manifest.json"]
    assert files_in(out) == after
    seen = set()
    for end in range(n_steps):
        with prepare() as staging:
            commit_until(staging, end)
        here = visible(out)
        if is_model(out):
            # Whole, old or new: never a mixture.
            assert here in (before, after)
            seen.add("old" if here == before else "new")
        else:
            seen.add("neither")
        if left := files_in(out / ".tvfast"):
            assert "lock" in left, "another process may come in before everything is gone"
        assert merge(out, new, resume=True) == []
        assert files_in(out) == after
    assert seen == {"neither", "new", *(["old"] if n_old else [])}


def test_the_order_of_a_commit_survives_a_loss_of_power(out: Path) -> None:
    """Process kills cannot show it: what a later step relies on is synced before that step."""
    old, new = small_layout(2, "old"), small_layout(3)
    merge(out, old, seed=1)
    log: list[tuple[str, str]] = []

    def logged(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def step(first: int | str, *args: str, **kwargs: object) -> object:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else (args or [first])[0]
            log.append(("sync" if "sync" in name else name, os.path.relpath(path, out)))
            return call(first, *args, **kwargs)

        return step

    with stage(out, new, overwrite=True) as staging, pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync", "rename", "replace"):
            patch.setattr(os, name, logged(name, getattr(os, name)))
        staging.commit()

    start = log.index(("replace", ".tvfast/manifest.json"))  # from here on the commit is decided
    names = [shard.name for shard in new.shards]
    index = "model.safetensors.index.json"
    for name in (*names, index, "tvfast_manifest.json"):
        assert ("sync", f".tvfast/files/{name}") in log[:start]
    assert {("sync", ".tvfast/files"), ("sync", ".tvfast/files/templates")} <= set(log[:start])
    retired = [i for i, (step, _) in enumerate(log) if step == "rename"]
    placed = [i for i, (step, path) in enumerate(log) if step == "replace" and i > start]
    assert ("sync", ".tvfast") in log[start : retired[0]]
    assert log[retired[0]][1] == f".tvfast/old/{index}"
    assert ("sync", ".") in log[retired[-1] : placed[0]]
    assert log[placed[-1]] == ("replace", index)
    assert {("sync", "."), ("sync", "templates")} <= set(log[placed[-2] : placed[-1]])
    assert log[-1] == ("sync", ".")


def test_the_commit_of_a_resumed_run_may_be_killed_again(out: Path) -> None:
    old, new = small_layout(2, "old"), small_layout(3)
    merge(out, old, seed=1)
    with stage(out, new, overwrite=True) as staging:
        n_steps = commit_until(staging, None)
    n_kills = 0
    shutil.rmtree(out)
    merge(out, old, seed=1)
    with stage(out, new, overwrite=True) as staging:
        commit_until(staging, n_steps // 2)
    for end in range(4, 200, 5):
        with pytest.MonkeyPatch.context() as patch:
            Clock(patch, end)
            try:
                merge(out, new, resume=True)
            except Killed:
                n_kills += 1
                continue
        break
    assert n_kills > 3
    assert visible(out).items() >= expected(new).items()
    assert not (out / ".tvfast").exists()


def test_overwriting_completes_a_commit_that_was_killed(out: Path) -> None:
    layouts = [small_layout(n, tag) for n, tag in ((2, "a"), (4, "b"), (3, "w"))]
    merge(out, layouts[0], seed=1)
    with stage(out, layouts[1], overwrite=True) as staging:
        n_steps = commit_until(staging, None)
    for end in points(n_steps, 12):
        shutil.rmtree(out)
        merge(out, layouts[0], seed=1)
        with stage(out, layouts[1], overwrite=True) as staging:
            commit_until(staging, end)
        manifest = out / ".tvfast" / "manifest.json"
        decided = not manifest.exists() or json.loads(manifest.read_text())["state"] == "committing"
        begin(out, layouts[2], 1, overwrite=True)
        if decided:
            assert visible(out).items() >= expected(layouts[1]).items(), "what was finished was thrown away"
        merge(out, layouts[2], overwrite=True)
        assert set(files_in(out)) == {*expected(layouts[2]), "tvfast_manifest.json"}
        assert files_in(out).items() >= expected(layouts[2]).items()


def test_a_staged_file_that_vanished_during_a_commit_is_an_error(out: Path) -> None:
    layout = small_layout()
    with stage(out, layout, overwrite=False) as staging:
        n_steps = commit_until(staging, None)
    shutil.rmtree(out)
    with stage(out, layout, overwrite=False) as staging:
        commit_until(staging, n_steps // 2)
    staged = next((out / ".tvfast" / "files").glob("*.safetensors"))
    staged.unlink()
    with pytest.raises(OutputError, match=rf"{staged.name}: is gone, .*--overwrite"):
        merge(out, layout, resume=True)
    assert not is_model(out)
    merge(out, layout, overwrite=True)
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "replace", "rename", "rmdir", "unlink"])
def test_every_failing_call_of_a_commit_is_a_named_error(out: Path, call: str) -> None:
    old, new = small_layout(2, "old"), small_layout(3)

    def prepare() -> Staging:
        shutil.rmtree(out, ignore_errors=True)
        merge(out, old, seed=1)
        return stage(out, new, overwrite=True)

    real, count, failing = getattr(os, call), 0, -1

    def flaky(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    with prepare() as staging, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, flaky)
        staging.commit()
    assert count > 0
    for position in range(1, count + 1):
        count, failing = 0, position
        with prepare() as staging, pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, flaky)
            with pytest.raises(OutputError, match=r"cannot .*: Input/output error\."):
                staging.commit()
        merge(out, new, resume=True)
        assert files_in(out).items() >= expected(new).items()


# The journal and the staged bytes.


def test_a_failed_sync_takes_nothing_for_finished(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = small_layout()
    calls = []

    def fail_second(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")

    with stage(out, layout, overwrite=False) as staging:
        monkeypatch.setattr(os, "fdatasync", fail_second)
        with pytest.raises(OutputError, match=r"model-00002-of-00003\.safetensors: cannot bring"):
            staging.commit()
    # The system may have dropped pages of the second shard that it still shows: they are written again.
    assert merge(out, layout, resume=True) == [u for u in units_of(layout) if u[0] == 1 and u[2]]
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("n_cut", [1, 5, RECORD_BYTES - 1, RECORD_BYTES, 3 * RECORD_BYTES + 7])
def test_a_torn_journal_costs_what_was_torn_off(out: Path, n_cut: int) -> None:
    layout = small_layout()
    done = begin(out, layout, 9)
    journal = out / ".tvfast" / "journal"
    raw = journal.read_bytes()
    assert len(raw) == len([u for u in done if u[2]]) * RECORD_BYTES
    journal.write_bytes(raw[:-n_cut])
    n_lost = -(-n_cut // RECORD_BYTES)
    written = merge(out, layout, resume=True)
    assert written == [u for u in units_of(layout) if u[2]][len(raw) // RECORD_BYTES - n_lost :]
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("tail", [bytes(100), b"\xff" * 31, b"tvj1" * 20])
def test_rubbish_behind_the_journal_is_cut_off(out: Path, tail: bytes) -> None:
    layout = small_layout()
    begin(out, layout, 6)
    journal = out / ".tvfast" / "journal"
    size = journal.stat().st_size
    with journal.open("ab") as file:
        file.write(tail)
    with Staging.open(str(out), layout, IDENTITY, resume=True, overwrite=False) as staging:
        assert journal.stat().st_size == size
        write_units(staging, contents(layout), units_of(layout)[:9])
    assert merge(out, layout, resume=True) == [u for u in units_of(layout)[9:] if u[2]]


def test_bit_rot_is_redone(out: Path) -> None:
    layout = small_layout()
    done = begin(out, layout, 15)
    shard, offset, n_bytes = done[4]
    path = out / ".tvfast" / "files" / layout.shards[shard].name
    raw = bytearray(path.read_bytes())
    raw[offset + n_bytes - 1] ^= 0x10
    path.write_bytes(raw)
    assert merge(out, layout, resume=True) == [done[4]]
    assert files_in(out).items() >= expected(layout).items()


def test_a_damaged_header_is_written_again(out: Path) -> None:
    layout = small_layout()
    begin(out, layout, 15)
    path = out / ".tvfast" / "files" / layout.shards[0].name
    path.write_bytes(b"\0" * 4096 + path.read_bytes()[4096:])
    assert merge(out, layout, resume=True) == []
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_staged_files_of_another_size_are_mended(out: Path, damage: str) -> None:
    layout = small_layout()
    done = begin(out, layout, 15)
    path = out / ".tvfast" / "files" / layout.shards[1].name
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        os.truncate(path, 6000)
    else:
        os.truncate(path, layout.shards[1].n_bytes + 5)
    redone = merge(out, layout, resume=True)
    assert redone == ([] if damage == "long" else [u for u in done if u[0] == 1])
    assert files_in(out).items() >= expected(layout).items()


def test_staging_that_is_removed_during_the_run_is_noticed(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        write_units(staging, contents(layout), units_of(layout)[:3])
        shutil.rmtree(out / ".tvfast")
        with pytest.raises(
            OutputError, match=r"journal: cannot find .*removed or renamed while the merge ran"
        ):
            write_units(staging, contents(layout), units_of(layout)[3:])
    merge(out, layout, resume=True)
    assert files_in(out).items() >= expected(layout).items()


@pytest.mark.parametrize("damage", ["unlinked", "replaced", "cut"])
def test_a_shard_that_is_changed_during_the_run_is_noticed(out: Path, damage: str) -> None:
    layout = small_layout()
    path = out / ".tvfast" / "files" / layout.shards[2].name
    with stage(out, layout, overwrite=False) as staging:
        raw = path.read_bytes()
        if damage == "cut":
            os.truncate(path, len(raw) - 1)
        else:
            path.unlink()
        if damage == "replaced":
            path.write_bytes(raw)
        with pytest.raises(OutputError, match=r"removed or renamed|replaced or cut|cannot be read back"):
            staging.commit()
    assert not is_model(out)
    merge(out, layout, resume=True)
    assert files_in(out).items() >= expected(layout).items()


def test_a_journal_that_is_replaced_is_noticed(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        journal = out / ".tvfast" / "journal"
        journal.rename(out / ".tvfast" / "other")
        journal.write_bytes(b"")
        with pytest.raises(OutputError, match=r"journal: the file was replaced"):
            write_units(staging, contents(layout), units_of(layout))


def test_records_of_other_files_are_not_believed(out: Path) -> None:
    layout = small_layout()
    begin(out, layout, 3)
    journal = Journal(str(out / ".tvfast" / "journal"))
    zeros = crc32c(0, 0)
    for record in [Record(99, 4096, 10, zeros), Record(0, 0, 4096, zeros), Record(1, 4096, 2**60, zeros)]:
        journal.append(record)
    journal.close()
    assert merge(out, layout, resume=True) == [u for u in units_of(layout)[3:] if u[2]]
    assert files_in(out).items() >= expected(layout).items()


def test_a_closed_staging_takes_nothing(out: Path) -> None:
    layout = small_layout()
    with Staging.open(str(out), layout, IDENTITY, resume=False, overwrite=False) as staging:
        pass
    staging.abandon()
    for call in (lambda: staging.done(0, 4096, 10, 0), lambda: staging.add_file("x", b""), staging.commit):
        with pytest.raises(MergeError, match="closed already"):
            call()


CHILD = """
import os, signal, sys
from tests.engine.staged import merge, small_layout, recut
from tests.engine import staged
out, end, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
count = 0
def counted(call):
    def step(*args, **kwargs):
        global count
        if count == end:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return call(*args, **kwargs)
    return step
for name in sys.argv[4].split(","):
    setattr(os, name, counted(getattr(os, name)))
layout = small_layout(2)
merge(out, layout, resume=resume, units=recut(layout, end if end >= 0 else 0))
print(count)
"""


def run_child(out: Path, end: int, *, resume: bool) -> subprocess.CompletedProcess[str]:
    arguments = [str(out), str(end), "resume" if resume else "", ",".join(STEPS)]
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_processes_that_are_killed_again_and_again(out: Path) -> None:
    layout = small_layout(2)
    whole = run_child(out, -1, resume=False)
    assert whole.stderr == ""
    after = files_in(out)
    assert after.items() >= expected(layout).items()
    n_killed = 0
    for end in points(int(whole.stdout), 6):
        shutil.rmtree(out, ignore_errors=True)
        killed = run_child(out, end, resume=False)
        again = run_child(out, end // 2, resume=True)
        for done in (killed, again):
            assert done.returncode in (0, -9), done.stderr
            n_killed += done.returncode == -9
        if is_model(out):
            assert visible(out) == after
        merge(out, layout, resume=True)
        assert files_in(out) == after
    assert n_killed > 6
