"""`merge_` on tensors of several devices: one table each, and named errors before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tvfast
from tvfast import merging
from tvfast._leaves import Leaf
from tvfast._scores import LeafScores
from tvfast.errors import BackendError, DeviceError, LayoutError
from tvfast.methods import make_method
from tvfast.program import DType, View, WorkTable


@pytest.fixture
def fakes() -> FakeTensorMode:
    """Fake tensors know their device and hold no data, so that no GPU is needed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def on(mode: FakeTensorMode, device: str, n: int = 4) -> Tensor:
    with mode:
        return torch.empty(n, device=device)


@pytest.mark.parametrize(
    ("base_device", "model_device", "message"),
    [
        ("cuda:0", "cpu", r"tensor 'b': models\[1\] is on cpu, base on cuda:0; expected one device"),
        ("cuda:0", "cuda:1", r"tensor 'b': models\[1\] is on cuda:1, base on cuda:0"),
        ("cpu", "meta", r"tensor 'b': models\[1\] is on meta, base on cpu"),
    ],
)
def test_counterparts_on_different_devices(
    fakes: FakeTensorMode, base_device: str, model_device: str, message: str
) -> None:
    base = {"a": torch.zeros(4), "b": on(fakes, base_device)}
    models = [
        {"a": torch.ones(4), "b": on(fakes, device)} for device in (base_device, model_device, base_device)
    ]
    if base_device == "cpu":
        base["b"] = torch.zeros(4)
        models[0]["b"] = models[2]["b"] = torch.ones(4)
    for call in (tvfast.merge_, tvfast.merge):
        with pytest.raises(DeviceError, match=message):
            call(base, models, "task_arithmetic")
    with pytest.raises(DeviceError, match=message):
        tvfast.LiveMerge(base, models=models)
    with pytest.raises(DeviceError, match=message.replace("models", "deltas")):
        tvfast.LiveMerge(base, deltas=models)
    assert base["a"].tolist() == [0.0] * 4


def test_a_view_that_is_not_contiguous_after_one_that_is() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4, 3).t()}
    models = [{"a": torch.ones(4), "b": torch.ones(3, 4)}]
    with pytest.raises(
        LayoutError, match=r"tensor 'b': base is not contiguous: shape \[3, 4\], strides \[1, 3\]"
    ):
        tvfast.merge_(base, models, "task_arithmetic")
    assert base["a"].tolist() == [0.0] * 4
    with pytest.raises(LayoutError, match=r"tensor 'b': models\[0\] is not contiguous"):
        tvfast.merge_(
            {"a": base["a"], "b": torch.zeros(3, 4)}, [{"a": torch.ones(4), "b": base["b"]}], "ties"
        )
    assert base["a"].tolist() == [0.0] * 4


def leaf(mode: FakeTensorMode, name: str, device: str, address: int) -> Leaf:
    base, model = on(mode, device), on(mode, device)
    return Leaf(
        name,
        base,
        (model,),
        View(address, 4, DType.F32, base),
        (View(address + 16, 4, DType.F32, model),),
    )


class AnyBackend:
    name = "any"

    def why_not(self, table: WorkTable) -> str | None:
        return None


def test_one_table_per_device_however_many_tensors(
    fakes: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = ("cuda:0", "cuda:1", "cpu")
    leaves = [leaf(fakes, f"{i}", devices[i % 3], 64 * i) for i in range(900)]
    monkeypatch.setattr(merging, "backend_for", lambda table: AnyBackend())
    method = make_method("task_arithmetic")
    tables = [
        table
        for table, _ in merging.work_tables(
            method, leaves, [LeafScores()] * len(leaves), [one.base for one in leaves]
        )
    ]
    assert len(tables) == 3
    for table, device in zip(tables, devices, strict=True):
        assert {str(entry.models[0].owner.device) for entry in table.entries} == {device}
        assert len(table.entries) == 300


def test_thresholds_of_the_whole_model_need_one_device(fakes: FakeTensorMode) -> None:
    leaves = [leaf(fakes, "a", "cuda:0", 0), leaf(fakes, "b", "cpu", 64)]
    method = make_method("ties", scope="model")
    with pytest.raises(DeviceError, match="ranks all tensors together; found them on cpu, cuda:0"):
        list(merging.work_tables(method, leaves, [LeafScores()] * len(leaves), [one.base for one in leaves]))


def test_no_backend_for_a_device_is_found_before_another_is_written(
    fakes: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TVFAST_BACKEND", raising=False)
    here = torch.zeros(4)
    real = Leaf(
        "a", here, (torch.ones(4),), View(here.data_ptr(), 4, DType.F32, here), (View(0, 4, DType.F32, here),)
    )
    elsewhere = leaf(fakes, "b", "cuda:0", 64)

    def choose(table: WorkTable) -> Any:
        if table.entries[0].name == "b":
            raise BackendError("no backend can run: cpp: tensor 'b' is on cuda:0.")
        return AnyBackend()

    monkeypatch.setattr(merging, "backend_for", choose)
    nothing = merging._Extra([LeafScores()] * 2, None, None)
    with pytest.raises(BackendError, match="tensor 'b' is on cuda:0"):
        merging._run(make_method("task_arithmetic"), [real, elsewhere], nothing, [here, elsewhere.base], 1)
    assert here.tolist() == [0.0] * 4
