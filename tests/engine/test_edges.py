"""What ordinary models do not have: files that shrink, few descriptors, unlucky threads, odd shapes."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tests.engine.test_plan import plan_of, tasks_of
from tvfast.engine import inputs as reading
from tvfast.engine import plan as planning
from tvfast.engine import run as running
from tvfast.engine.inputs import Extent, FileState, Inputs
from tvfast.engine.memory import PAGE, Arena, Block
from tvfast.engine.passes import count_passes
from tvfast.engine.plan import MiB, Plan
from tvfast.engine.shards import ShardFiles
from tvfast.errors import MergeError, OutputError
from tvfast.methods import make_method

MEMBERS = ("base", "ft1", "ft2")


def family(root: Path, shapes: dict[str, tuple[int, ...]], **copied: Tensor) -> dict[str, dict[str, Tensor]]:
    """A base and two models on disk, and the same in memory."""
    drawn = torch.Generator().manual_seed(5)
    found: dict[str, dict[str, Tensor]] = {}
    base = {name: torch.randn(shape, generator=drawn) * 0.02 for name, shape in shapes.items()}
    for member in MEMBERS:
        tensors = {
            name: (tensor + (member != "base") * 1e-3 * torch.randn(tensor.shape, generator=drawn)).bfloat16()
            for name, tensor in base.items()
        }
        found[member] = {**tensors, **copied}
        (root / member).mkdir(parents=True)
        save_file(found[member], root / member / "model.safetensors")
    return found


def recipe(root: Path, method: str, parameters: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / m), "parameters": {"weight": 1.0}} for m in MEMBERS[1:]],
        "parameters": parameters,
        "tvfast": own,
    }


# -- reading ----------------------------------------------------------------------------------------


def first(inputs: Inputs, extent: Extent, block: Block) -> Future[None]:
    return inputs.read([extent], block)[0]


def test_a_file_that_is_cut_under_a_direct_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(100_000))
    inputs = Inputs({str(path): FileState.of(path.stat())}, direct=True, on_read=[].append)
    with Arena(MiB).acquire(200_000) as block:
        first(inputs, Extent(str(path), 0, PAGE, 0), block).result()
        os.truncate(path, 50_000)
        cut = first(inputs, Extent(str(path), PAGE, 90_000, PAGE), block)
        with pytest.raises(MergeError, match="data: ends at byte 50000, expected 94096 or more"):
            cut.result(timeout=5)
    inputs.close()


def test_a_file_system_that_opens_for_direct_reads_but_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    content = os.urandom(300_001)
    path.write_bytes(content)
    read = os.preadv
    n_refused = 0

    def refuse_direct(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal n_refused
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            n_refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_direct)
    inputs = Inputs({str(path): FileState.of(path.stat())}, direct=True, on_read=[].append)
    with Arena(MiB).acquire(400_000) as block:
        first(inputs, Extent(str(path), 7, 299_994, 7), block).result()
        assert bytes(block.view[7:300_001]) == content[7:]
    inputs.close()
    assert n_refused == 1


def test_more_input_files_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_OPEN", 4)
    paths = [tmp_path / str(k) for k in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode() * 500)
    inputs = Inputs({str(p): FileState.of(p.stat()) for p in paths}, direct=False, on_read=[].append)
    n_before = len(os.listdir("/proc/self/fd"))
    with Arena(MiB).acquire(MiB) as block:
        for _ in range(2):
            for k, path in enumerate(paths):
                first(inputs, Extent(str(path), 0, 500, k * PAGE), block).result()
                assert len(os.listdir("/proc/self/fd")) <= n_before + 5
        for k, path in enumerate(paths):
            assert bytes(block.view[k * PAGE :][:500]) == path.read_bytes()[:500]
    inputs.close()
    assert len(os.listdir("/proc/self/fd")) == n_before


# -- failing ----------------------------------------------------------------------------------------


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROGRAM_BYTES", "SCRATCH_BYTES", "RANK_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(planning, name, 0)
    monkeypatch.setattr(planning, "UNIT_BYTES", MiB)


@pytest.mark.usefixtures("small_units")
def test_the_memory_of_a_unit_that_failed_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other reads into it may still be under way: what is merged from it could be wrong."""
    family(tmp_path, {f"w{k}": (300, 400) for k in range(6)})
    monkeypatch.setattr(running, "Arena", lambda n_bytes: Arena(MiB))  # of one unit
    release = Block.release

    def release_slowly(self: Block) -> None:  # another thread runs as soon as it can
        release(self)
        time.sleep(0.2)

    def fail_once(self: Inputs, piece: Extent, block: Any) -> None:
        if not begun.is_set():
            begun.set()
            raise MergeError("unlucky")
        late.append(piece)

    begun, late = threading.Event(), list[Extent]()
    monkeypatch.setattr(Block, "release", release_slowly)
    monkeypatch.setattr(Inputs, "_read", fail_once)
    monkeypatch.setattr(Inputs, "_show", lambda self, extent, block: False)
    written: list[Any] = []
    monkeypatch.setattr(ShardFiles, "write", lambda self, *arguments: written.append(arguments))
    with pytest.raises(MergeError, match="unlucky"):
        tvfast.merge_checkpoints(recipe(tmp_path, "task_arithmetic", {}), tmp_path / "out", threads=1)
    assert not written
    assert all(piece.offset < 2 * MiB for piece in late)


class Counts:
    """Adds up what a merge tells about its progress."""

    def __init__(self) -> None:
        self.planned = self.written = 0
        self._lock = threading.Lock()

    def start(self, read_bytes: int, write_bytes: int) -> None:
        self.planned = write_bytes

    def read(self, n_bytes: int) -> None: ...

    def wrote(self, n_bytes: int) -> None:
        with self._lock:
            self.written += n_bytes

    def finish(self) -> None: ...


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("own", "memory"), [({}, None), ({"dialect": "paper"}, 5 * MiB)], ids=["tensor", "model"]
)
def test_a_continued_merge_ends_at_all_of_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], memory: int | None
) -> None:
    family(tmp_path, {f"w{k}": (900, 1100) for k in range(4)})
    config = recipe(tmp_path, "ties", {"density": 0.3}, **own)
    write = ShardFiles.write
    n_left = 2

    def fail_after(self: ShardFiles, *arguments: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OutputError("no space left")
        write(self, *arguments)

    monkeypatch.setattr(ShardFiles, "write", fail_after)
    with pytest.raises(OutputError):
        tvfast.merge_checkpoints(config, tmp_path / "out", memory=5 * MiB, threads=1)
    monkeypatch.setattr(ShardFiles, "write", write)
    counts = Counts()
    # With all memory, units are cut in another way than those that were finished.
    report = tvfast.merge_checkpoints(
        config, tmp_path / "out", memory=memory, threads=2, resume=True, progress=counts
    )
    assert report.resumed_bytes > 0
    assert counts.written == counts.planned > 0
    tvfast.merge_checkpoints(config, tmp_path / "whole")
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.usefixtures("small_units")
def test_an_interrupted_unit_is_not_merged_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, {"w": (900, 1100)})
    wait = running.wait
    n_waits = 0

    def interrupt(workers: Any) -> Any:
        nonlocal n_waits
        n_waits += 1
        if n_waits == 1:
            assert reached.wait(10)
            raise KeyboardInterrupt
        interrupted.set()
        return wait(workers)

    def load(*arguments: Any) -> list[Any]:
        reached.set()
        assert interrupted.wait(10)
        return []

    reached, interrupted = threading.Event(), threading.Event()
    monkeypatch.setattr(running, "wait", interrupt)
    monkeypatch.setattr(running, "load", load)
    merged: list[Any] = []
    monkeypatch.setattr(running, "TableStatistics", lambda *a: merged.append(a))
    with pytest.raises(KeyboardInterrupt):
        tvfast.merge_checkpoints(recipe(tmp_path, "ties", {"density": 0.3}), tmp_path / "out")
    assert not merged


# -- plans ------------------------------------------------------------------------------------------


def test_passes_of_a_whole_model_do_not_depend_on_its_first_tensor() -> None:
    method = make_method("ties", density=0.2, dialect="paper")
    assert count_passes(tasks_of([(0,), (1,), (100, 100)], method, dtype="F32")) == 3


@pytest.mark.parametrize(
    ("own", "least"), [({}, 2400), ({"dialect": "paper"}, 6800)], ids=["tensor", "model"]
)
def test_what_is_known_of_many_tensors_is_planned(own: dict[str, Any], least: int) -> None:
    """A mixture of experts has 90 000; the figures are measured, per tensor of a base and three models."""
    method = make_method("ties", density=0.2, **own)
    few = plan_of(tasks_of([(8, 16)] * 10, method), n_threads=2)
    many = plan_of(tasks_of([(8, 16)] * 10_010, method), n_threads=2)

    def beside_tensors(plan: Plan) -> int:
        return plan.peak_bytes - min(plan.arena_bytes, sum(unit.n_bytes for unit in plan.units))

    objects = beside_tensors(many) - beside_tensors(few)
    assert 10_000 * least < objects < 20_000 * least


def test_long_rows_are_planned_with_the_memory_that_their_ranks_can_take() -> None:
    method = make_method("della", density=0.5, epsilon=0.1)
    tasks = tasks_of([(3, 4_000_000), (0, 7), (5, 0), (9_000_000,)], method, n_models=20)
    elements = tasks[-1].n_elements
    plan = plan_of(tasks, n_threads=16)
    assert plan.peak_bytes < 4 * 2**30
    assert (
        plan.peak_bytes > elements * 2 * 22 + planning.SEGMENT_BYTES
    )  # its inputs and output, a segment's ranks
    assert plan_of(tasks, n_threads=16, memory=2 * 2**30).peak_bytes <= 2 * 2**30


@pytest.mark.parametrize(
    "own", [{"dialect": "paper"}, {"tie": "index"}, {}], ids=["model", "index", "tensor"]
)
def test_votes_of_16_bit_models_are_counted_along_with_the_thresholds(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    """Two passes over a whole model and the sample, as planned."""
    shapes = {"a.first": (1,), "b.scalar": (), "c.none": (0, 4), "d.conv": (5, 3, 33), "w": (3000, 3000)}
    tensors = family(tmp_path, shapes, steps=torch.tensor([1, 2, 3]))
    config = recipe(tmp_path, "ties", {"density": 0.2}, **own)
    report = tvfast.merge_checkpoints(config, tmp_path / "out")
    planned = tvfast.plan(config)
    assert report.read_bytes == planned.read_bytes
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = tvfast.merge(tensors["base"], [tensors[m] for m in MEMBERS[1:]], "ties", density=0.2, **own)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_model_of_small_tensors_is_sampled_like_one_of_large_ones(tmp_path: Path) -> None:
    tensors = family(tmp_path, {f"w{k:04}": (24, 40) for k in range(3000)})
    config = recipe(tmp_path, "ties", {"density": 0.2}, dialect="paper")
    report = tvfast.merge_checkpoints(config, tmp_path / "out")
    planned = tvfast.plan(config)
    n_elements, n_sampled = 3000 * 24 * 40, 2**20
    assert planned.read_bytes == 2 * len(MEMBERS) * (2 * n_elements + n_sampled)
    assert report.read_bytes == planned.read_bytes
    found = load_file(tmp_path / "out" / "model.safetensors")
    models = [tensors[m] for m in MEMBERS[1:]]
    expected = tvfast.merge(tensors["base"], models, "ties", density=0.2, dialect="paper")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
