"""CPU tensors on backends for GPUs, as these tests have them on a machine with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tvfast
from tests.devices.moving import standing_in
from tests.methods.inputs import grid, normal
from tests.ops.test_kron import blocks_of, drawn
from tests.strategies import assert_same_bits
from tvfast import ops


@pytest.fixture
def elsewhere(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend to which every tensor is moved, here to other memory of the same kind."""
    if torch.cuda.is_available():
        yield gpu
        return
    with standing_in(gpu, torch.device("cpu")) as found:
        yield found


def test_public_functions_have_the_same_bits(elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a": grid(9, 13), "b": grid(40, seed=1).bfloat16()}
    models = [{name: t + normal(*t.shape, seed=k).to(t.dtype) for name, t in base.items()} for k in range(3)]
    x, factors = drawn(0, 12, 10), (blocks_of(10, 5, 1), blocks_of(12, 5, 60))
    found: list[list[torch.Tensor]] = []
    for name in (elsewhere.name, "reference"):
        monkeypatch.setenv("TVFAST_BACKEND", name)
        merged = [
            tvfast.merge(base, models, "ties", density=0.3, tie="ge"),
            tvfast.merge_({n: t.clone() for n, t in base.items()}, models, "della", density=0.5),
        ]
        live = {n: t.clone() for n, t in base.items()}
        tvfast.LiveMerge(live, models=models, method="ties", density=0.3).set([0.5, 0.25, 1.0])
        tensors = [one[n].view(-1) for one in (*merged, live) for n in base]
        found.append([*tensors, ops.threshold([base["a"]], 0.3)])
    assert_same_bits(*found)
    monkeypatch.setenv("TVFAST_BACKEND", elsewhere.name)
    product, value = ops.kron(x, *factors, block=5)
    assert float(value) == pytest.approx(float((x.double() * product.double()).sum()))
    dense = [torch.block_diag(*blocks) for blocks in factors]
    panels, of_panels = ops.kron(x, *dense)
    assert torch.allclose(panels, product, atol=1e-4)
    assert float(of_panels) == pytest.approx(float(value), rel=1e-4)
