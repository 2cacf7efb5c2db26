"""Rows of matrices that stand in memory, and of those that are read: same bytes, no more than is allowed."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tvfast._C_cpu as _C_cpu

import tvfast
from tests.engine.test_plan import SUM, plan_of, tasks_of
from tests.vocabularies import EMBEDDINGS, tokenizer, write_model
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.engine import gathering
from tvfast.engine import plan as planning
from tvfast.engine.gather import Gather, RowMap
from tvfast.engine.plan import MiB
from tvfast.engine.shown import Allowance, Matrices, Standing, resident_bytes
from tvfast.errors import MergeError
from tvfast.ops.pages import PAGE

CONTENT = os.urandom(20 * PAGE)
PLACES = [(6, 3 * PAGE), (4 * PAGE + 100, 10 * PAGE)]
SIZES = [4 * PAGE, 11 * PAGE]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file that the page cache holds."""
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    with open(path, "rb") as file:
        standing = Standing.made(file.fileno(), 0, PAGE)
    if standing is None:
        pytest.skip("this system does not say what its page cache holds")
    standing.close()
    return str(path)


@contextmanager
def borrowed(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def matrices(path: str, allowance: Allowance, places: Sequence[tuple[int, int]]) -> Matrices:
    sources = [Stored("t", path, at, size, "BF16", (size // 2, 1)) for at, size in places]
    return Matrices(sources, borrowed, allowance)


def test_matrices_stand_in_memory_until_they_are_closed(path: str) -> None:
    allowance = Allowance(sum(SIZES))
    ours = matrices(path, allowance, PLACES)
    for _ in range(2):
        with ours.standing() as found:
            for one, (at, size) in zip(found, PLACES, strict=True):
                assert one is not None
                assert ctypes.string_at(one.address, size) == CONTENT[at : at + size]
                assert not one.lost
            again = found
        assert allowance.left == 0
        with ours.standing() as found:
            assert found == again
        ours.close()
        assert allowance.left == sum(SIZES)


def test_whoever_is_idle_gives_way_and_nobody_else(path: str) -> None:
    allowance = Allowance(SIZES[1])
    first, second = matrices(path, allowance, PLACES[1:]), matrices(path, allowance, PLACES)
    with first.standing() as found:
        assert found[0] is not None
        with second.standing() as others:
            assert others == (None, None), "the first is in use"
    with second.standing() as others:
        assert others[0] is not None
        assert others[1] is None, "both of them do not fit"
        assert allowance.left == SIZES[1] - SIZES[0]
        with first.standing() as found:
            assert found == (None,)
    with first.standing() as found:
        assert found[0] is not None
    first.close()
    second.close()
    assert allowance.left == SIZES[1]


def test_what_can_never_stand_drives_nobody_out(path: str) -> None:
    allowance = Allowance(SIZES[0])
    small, large = matrices(path, allowance, PLACES[:1]), matrices(path, allowance, PLACES[1:])
    with small.standing() as found:
        assert found[0] is not None
    with large.standing() as others:
        assert others == (None,)
    with small.standing() as again:
        assert again == found


def test_many_threads(path: str) -> None:
    allowance = Allowance(SIZES[1] + PAGE)
    all_of = [matrices(path, allowance, PLACES[1:]) for _ in range(3)]
    at, size = PLACES[1]
    right, wrong = [0] * 6, [0] * 6

    def work(k: int) -> None:
        for i in range(120):
            with all_of[(k + i // 40) % 3].standing() as found:
                if found[0] is not None:
                    same = ctypes.string_at(found[0].address, size) == CONTENT[at:][:size]
                    (right if same else wrong)[k] += 1

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(wrong) == 0 < sum(right)
    for ours in all_of:
        ours.close()
    assert allowance.left == SIZES[1] + PAGE


def test_what_the_page_cache_does_not_hold_is_read(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    allowance = Allowance(20 * PAGE)
    ours = matrices(path, allowance, PLACES)
    with ours.standing() as found:
        if found[0] is not None:
            pytest.skip("a file system that lives in the page cache")
        assert found == (None, None)
        assert allowance.left == 20 * PAGE
    Path(path).read_bytes()
    with ours.standing() as found:
        assert found == (None, None), "it is asked once"


@pytest.mark.parametrize("error", [FileNotFoundError, RuntimeError])
def test_an_error_leaves_nothing_behind(
    path: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    allowance = Allowance(20 * PAGE)
    if error is RuntimeError:  # what the system has no room for
        monkeypatch.setattr("tvfast.ops.pages._C_cpu", Broken())
    ours = matrices(path + "x" * (error is FileNotFoundError), allowance, PLACES)
    before = free_guard()
    with pytest.raises(error), ours.standing():
        raise AssertionError
    assert allowance.left == 20 * PAGE
    assert free_guard() == before
    ours.close()


class Broken:
    """The module, where nothing can be shown."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_C_cpu, name)

    def show_pages(self, *arguments: Any) -> bool:
        raise RuntimeError(arguments)


def free_guard() -> int:
    """The number that is given next."""
    found = int(_C_cpu.guard_pages(PAGE, PAGE))
    _C_cpu.end_guard(found)
    return found


@pytest.mark.parametrize(("offset", "n_bytes", "expected"), [(0, 1, 1), (1, PAGE, 2), (PAGE, PAGE, 1)])
def test_resident_bytes_are_those_of_whole_pages(offset: int, n_bytes: int, expected: int) -> None:
    assert resident_bytes(offset, n_bytes) == expected * PAGE


# -- merges -----------------------------------------------------------------------------------------------


WORDS = [f"w{k}" for k in range(700)]
FORCED = {"kind": "model_token", "model": "b", "token": "w200"}


def recipe(**keys: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    base = {"base_model": "a"} if keys.get("merge_method") == "ties" else {}
    return {"merge_method": "linear", "models": models, **base, **keys}


def write_models(tmp_path: Path, *dtypes: torch.dtype) -> None:
    write_model(tmp_path / "a", tokenizer(WORDS), 720, seed=1, dtype=dtypes[0], width=24)
    others = tokenizer(WORDS[:90:-1], ["<a>"])
    write_model(tmp_path / "b", others, 610, seed=2, dtype=dtypes[1], width=24)


def seen(monkeypatch: pytest.MonkeyPatch) -> list[Standing]:
    """The matrices that stand in memory from now on."""
    found: list[Standing] = []
    made = Standing.made

    def spied(descriptor: int, offset: int, n_bytes: int) -> Standing | None:
        standing = made(descriptor, offset, n_bytes)
        found.extend([standing] if standing else [])
        return standing

    monkeypatch.setattr(Standing, "made", spied)
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
        {"tokenizer": {"source": "base", "tokens": {"w5": {"source": FORCED, "force": True}}}},
        {"tokenizer_source": "union", "merge_method": "ties", "parameters": {"density": 0.3}},
        {
            "tokenizer_source": "union",
            "merge_method": "ties",
            "tvfast": {"dialect": "paper"},
            "parameters": {"density": 0.3},
        },
    ],
    ids=["union", "padded", "forced", "ties", "whole model"],
)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float32", "float16")], ids="-".join)
def test_merges_of_shown_and_of_read_rows_are_the_same(
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    dtypes: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, *(getattr(torch, dtype) for dtype in dtypes))
    monkeypatch.setattr("tvfast.engine.gather.WINDOW_BYTES", 3000)
    monkeypatch.setattr("tvfast.engine.cuts.CUT", 96)  # pieces of rows
    monkeypatch.setattr("tvfast.engine.plan.UNIT_BYTES", 40_000)
    standing = seen(monkeypatch)
    config = recipe(**keys)
    contents = []
    for n_bytes in (planning.SHOWN_BYTES, 48 * 1024, 0):
        monkeypatch.setattr(planning, "SHOWN_BYTES", n_bytes)
        tvfast.merge_checkpoints(config, tmp_path / "out", device="cpu", threads=2, overwrite=True)
        contents.append((tmp_path / "out" / "model.safetensors").read_bytes())
        assert bool(standing) == bool(n_bytes)
        assert all(one._memory.closed for one in standing)
        standing.clear()
    assert contents == contents[:1] * 3


@pytest.mark.parametrize("left", [PAGE, -10])
def test_a_file_that_is_shortened_while_rows_are_taken_is_named_and_no_zeros_are_kept(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Also by less than a page, which raises no signal: the rest of its page is zeros."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, torch.float32, torch.float32)
    monkeypatch.setattr("tvfast.engine.gather.WINDOW_BYTES", 3000)  # an error leaves most of them
    monkeypatch.setattr("tvfast.engine.cuts.CUT", 96)
    monkeypatch.setattr("tvfast.engine.plan.UNIT_BYTES", 40_000)
    config, out = recipe(tokenizer_source="union"), tmp_path / "out"
    tvfast.merge_checkpoints(config, tmp_path / "whole", device="cpu")
    victim = tmp_path / "b" / "model.safetensors"
    status, content = victim.stat(), victim.read_bytes()
    matrix = open_checkpoint(str(tmp_path / "b")).tensors[EMBEDDINGS]
    standing = seen(monkeypatch)
    gather_rows = gathering.gather_rows

    def cut(*arguments: Any) -> None:
        os.truncate(victim, left if left > 0 else matrix.offset + matrix.n_bytes + left)
        gather_rows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gathering, "gather_rows", cut)
        with pytest.raises(MergeError, match=r"b/model\.safetensors: (ends at byte|input has)"):
            tvfast.merge_checkpoints(config, out, device="cpu", threads=1)
    assert standing
    assert all(one._memory.closed for one in standing)
    victim.write_bytes(content)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    tvfast.merge_checkpoints(config, out, device="cpu", threads=1, resume=True)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_system_cannot_read_again_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, torch.float32, torch.float32)
    monkeypatch.setattr(Standing, "lost", True)
    with pytest.raises(MergeError, match=r"a/model\.safetensors: rows of it cannot be read any more"):
        tvfast.merge_checkpoints(recipe(tokenizer_source="union"), tmp_path / "out", device="cpu")


def test_a_run_that_goes_on_has_them_too(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts of a matrix were merged before, nobody takes all of its rows."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, torch.float32, torch.float32)
    monkeypatch.setattr("tvfast.engine.gather.WINDOW_BYTES", 3000)
    monkeypatch.setattr("tvfast.engine.cuts.CUT", 96)
    monkeypatch.setattr("tvfast.engine.plan.UNIT_BYTES", 40_000)
    monkeypatch.setattr(planning, "SHOWN_BYTES", 36 * PAGE)  # one matrix by token of each model, not two
    gather_rows, calls = gathering.gather_rows, [0]

    def stops(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise EOFError(0, 0)
        gather_rows(*arguments)

    config, out = recipe(tokenizer_source="union"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "gather_rows", stops)
        with pytest.raises(MergeError, match="ends at byte 0"):
            tvfast.merge_checkpoints(config, out, device="cpu", threads=1)
    shown: set[tuple[int, int]] = set()

    def counted(sources: Sequence[Any], *arguments: Any) -> None:
        shown.update((source.descriptor, source.offset) for source in sources if source.shown)
        gather_rows(sources, *arguments)

    monkeypatch.setattr(gathering, "gather_rows", counted)
    tvfast.merge_checkpoints(config, out, device="cpu", threads=1, resume=True)
    assert len(shown) == 4, "two matrices of two models"


# -- plans ------------------------------------------------------------------------------------------------


def test_what_stands_in_memory_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tasks_of([(50_000, 1024), (64, 64)], SUM, n_models=1)
    without = plan_of(tasks)
    rows = array("i", range(50_000))
    gather = Gather(tasks[0].inputs, "BF16", RowMap((rows, rows), rows, (), 50_000), (0, 1))
    gathered = (replace(tasks[0], gather=gather), tasks[1])
    size = 2 * resident_bytes(72, 2 * 50_000 * 1024)
    plan = plan_of(gathered)
    assert plan.shown_bytes == size
    assert plan.peak_bytes == without.peak_bytes + size
    assert without.shown_bytes == 0
    tight = plan_of(gathered, memory=plan.peak_bytes - 8 * MiB)
    assert 0 < tight.shown_bytes < size
    assert tight.peak_bytes <= plan.peak_bytes - 8 * MiB
    with pytest.raises(tvfast.errors.ArgumentError, match="needs at least") as found:
        plan_of(gathered, memory=MiB)
    least = int(str(found.value).split("at least ")[1].split()[0])
    assert plan_of(gathered, memory=least).shown_bytes == 0
    many = (*gathered, *(replace(gathered[0], name=f"m{k}", key=f"m{k}") for k in range(5)))
    assert plan_of(many).shown_bytes == planning.SHOWN_BYTES
    monkeypatch.setattr(planning, "free_memory", lambda: 2 * (without.arena_bytes + size // 2 + PAGE))
    assert plan_of(gathered).shown_bytes == size // 2 + PAGE, "half of what is free"
    monkeypatch.setattr(planning, "SHOWN_BYTES", size // 2 - PAGE)
    assert plan_of(gathered).shown_bytes == 0, "no matrix fits"
    monkeypatch.setattr(planning, "SHOWN_BYTES", size)
    monkeypatch.setattr(planning, "stay_cached", lambda n_bytes: n_bytes < 2**20)
    assert plan_of(gathered).shown_bytes == 0, "reads go past the page cache"


def test_a_run_is_within_the_memory_that_was_planned(path: str, tmp_path: Path) -> None:
    words = [f"w{k}" for k in range(30_000)]
    for name, listed, seed in (("a", words, 1), ("b", words[::-1], 2)):
        document = tokenizer(listed)
        write_model(tmp_path / name, document, 30_000, seed=seed, dtype=torch.bfloat16, width=512, n_layers=1)
    code = (
        "import sys, json, tvfast\n"
        "r = tvfast.merge_checkpoints(json.loads(sys.argv[1]), sys.argv[2], threads=1, device='cpu')\n"
        "print(r.peak_bytes, r.planned_peak_bytes)"
    )
    config = json.dumps(recipe(tokenizer_source="union"))
    done = subprocess.run(
        [sys.executable, "-c", code, config, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    peak, planned = map(int, done.stdout.split())
    assert peak < planned
