"""Inputs that the page cache holds stand in memory where others are read into it: same bytes, same errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import tvfast
from tests.engine.test_edges import family, recipe
from tvfast.engine import plan as planning
from tvfast.engine import run as running
from tvfast.engine import source
from tvfast.engine.inputs import Extent, Inputs
from tvfast.engine.memory import Arena, Buffer
from tvfast.engine.plan import MiB
from tvfast.errors import MergeError
from tvfast.ops.pages import ShownPages

SHAPES = {"a": (700, 900), "b": (3,), "c": (1200, 700), "d": (0, 4), "e": (1,)}
RUNS = {
    "linear": ({}, {}),
    "model_stock": ({}, {}),
    "nuslerp": ({}, {}),
    "ties": ({"density": 0.3}, {}),
    "della": ({"density": 0.5, "epsilon": 0.1}, {}),
    "whole model": ({"density": 0.3}, {"dialect": "paper"}),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with which tensors of some hundred kilobytes are streamed."""
    for name in ("PROGRAM_BYTES", "SCRATCH_BYTES", "RANK_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(planning, name, 0)
    return {"memory": 4 * MiB, "threads": 1}


def shown_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are shown; skips where the system cannot."""
    seen: list[int] = []
    show = ShownPages.show

    def spied(self: ShownPages, descriptor: int, offset: int, n_bytes: int, at: int) -> bool:
        done = show(self, descriptor, offset, n_bytes, at)
        seen.extend([n_bytes] * done)
        return done

    monkeypatch.setattr(ShownPages, "show", spied)
    return seen


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShownPages, "show", lambda *arguments: False)


def merged(root: Path, out: Path, name: str, **options: Any) -> bytes:
    parameters, own = RUNS[name]
    method = "ties" if name == "whole model" else name
    tvfast.merge_checkpoints(recipe(root, method, parameters, **own), out, **options)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("streamed", [False, True])
def test_merges_of_shown_and_of_read_inputs_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, Any], name: str, streamed: bool
) -> None:
    family(tmp_path, SHAPES)
    options = small if streamed else {}
    seen = shown_only(monkeypatch)
    first = merged(tmp_path, tmp_path / "shown", name, **options)
    if not seen:
        pytest.skip("this system does not say what its page cache holds")
    assert sum(seen) >= 2 * 2 * (700 * 900 + 1200 * 700)
    read_only(monkeypatch)
    assert merged(tmp_path, tmp_path / "read", name, **options) == first


@pytest.mark.parametrize(
    ("method", "left"), [("ties", 4096), ("nuslerp", 400), ("ties", -100), ("nuslerp", -100)]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_input_that_is_shortened_while_it_is_shown_is_named_and_nothing_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: dict[str, Any],
    streamed: bool,
    method: str,
    left: int,
) -> None:
    """Also where a method would have none of the zeros that take the place of what is lost, and where it
    is less than a page, which raises no signal."""
    family(tmp_path, {"a": (700, 900), "b": (1200, 700)})
    victim = tmp_path / "ft2" / "model.safetensors"
    size = victim.stat().st_size
    seen = shown_only(monkeypatch)
    where: Any = source if streamed else running
    original = where.load

    def cut(inputs: Inputs, loaded: Any) -> Any:
        reads = original(inputs, loaded)
        os.truncate(victim, left if left > 0 else size + left)
        return reads

    monkeypatch.setattr(where, "load", cut)
    done: list[Any] = []
    monkeypatch.setattr("tvfast.engine.staging.Staging.done", lambda self, *a: done.append(a))
    options = small if streamed else {"threads": 1}
    with pytest.raises(MergeError, match=r"ft2/model\.safetensors: (input has [0-9]+ bytes|ends at byte)"):
        merged(tmp_path, tmp_path / "out", method, **options)
    if not seen:
        pytest.skip("this system does not say what its page cache holds")
    assert not done


def test_direct_reads_and_devices_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10_000))
    read_only(monkeypatch)
    state = {str(path): running.FileState.of(path.stat())}
    for direct, shown in ((True, True), (False, False)):
        asked: list[Buffer] = []
        monkeypatch.setattr(ShownPages, "show", lambda self, *a, asked=asked: asked.append(self))
        inputs = Inputs(state, direct=direct, on_read=[].append, shown=shown)
        with Arena(MiB).acquire(MiB) as block:
            for future in inputs.read([Extent(str(path), 0, 10_000, 0)], block):
                future.result()
        inputs.close()
        assert not asked
