"""Live weights and hundreds of small tensors on the Triton backend, in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import grid, normal
from tests.strategies import bits
from tvfast.ops.raw import Backend


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("task_arithmetic", {}), ("ties", {"density": 0.3}), ("della", {"density": 0.5}), ("sce", {})],
)
def test_live_merges_have_the_bits_of_the_reference(
    triton_backend: Backend, method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"a": grid(9, 13), "b": grid(40, seed=1).bfloat16()}
    deltas = [{name: normal(*t.shape, seed=k).to(t.dtype) for name, t in base.items()} for k in range(3)]
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TVFAST_BACKEND", backend)
        live = {name: t.clone() for name, t in base.items()}
        with tvfast.LiveMerge(live, deltas=deltas, method=method, **parameters) as merging:
            merging.set({"a": [0.5, 0.25, 1.0], "b": [1.0, -0.5, 0.3]}, scale=0.8)
            found[backend] = {name: t.clone() for name, t in live.items()}
        assert all(torch.equal(bits(live[name]), bits(base[name])) for name in base)
    for name in base:
        assert torch.equal(bits(found["triton"][name]), bits(found["reference"][name]))


def test_long_rows_of_deltas_are_ranked_as_they_are(
    triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that torch sorts, since no program instance can: nothing is subtracted from a task vector."""
    from tvfast.kernels.ranks import LONGEST_ROW

    width = LONGEST_ROW + 52
    base = {"a": grid(2, width)}
    deltas = [{"a": normal(2, width, seed=k)} for k in range(2)]
    found = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TVFAST_BACKEND", backend)
        live = {"a": base["a"].clone()}
        with tvfast.LiveMerge(live, deltas=deltas, method="della", density=0.5) as merging:
            merging.set([0.5, 0.25])
            found[backend] = live["a"].clone()
    assert torch.equal(bits(found["triton"]), bits(found["reference"]))


def test_gradients_have_the_bits_of_the_reference(
    triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"a": grid(9, 13), "b": grid(40, seed=1)}
    tasks = [{name: normal(*t.shape, seed=k) for name, t in base.items()} for k in range(3)]
    grads = {name: normal(*t.shape, seed=9) for name, t in base.items()}
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TVFAST_BACKEND", backend)
        for operands in ({"deltas": tasks}, {"models": tasks}):
            live = tvfast.LiveMerge({n: t.clone() for n, t in base.items()}, scale=0.3, **operands)
            live.set([[0.5, 0.25], [0.5, 1.0], [2.0, 1.0]])
            found.append(live.gradient(grads))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def test_hundreds_of_small_tensors_are_one_launch(
    triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvfast.kernels import launch

    n_launches = 0
    combine = launch.combine

    def counted(*arguments: Any) -> None:
        nonlocal n_launches
        n_launches += 1
        combine(*arguments)

    monkeypatch.setattr(launch, "combine", counted)
    # 16 bytes apart, as an allocator gives them: all of one kind
    shared = torch.zeros(3, 200, 4)
    values = normal(3, 200, 4)
    shared.copy_(values)

    def named(part: Tensor) -> dict[str, Tensor]:
        return {f"layers.{i}.norm": row for i, row in enumerate(part)}

    tvfast.merge_(named(shared[0]), [named(shared[1]), named(shared[2])], "task_arithmetic")
    assert n_launches == 1
    base = values[0]
    expected = base + ((values[1] - base) + (values[2] - base))
    assert torch.equal(shared[0], expected)
