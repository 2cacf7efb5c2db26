"""Merges on a device: the bytes of the CPU's, whatever its memory and in whatever order its queues end."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tvfast
from tests.conftest import load
from tests.engine.devices import MEMBERS, merge_on, recipe, small_units, using, write_family
from tests.engine.double import Fault, HostDouble
from tvfast.checkpoint.reading import open_checkpoint
from tvfast.engine import device_plan
from tvfast.engine.device import OutOfDeviceMemory
from tvfast.errors import ArgumentError, MergeError

__all__ = ["small_units"]

pytestmark = pytest.mark.usefixtures("small_units")

METHODS = [
    ("task_arithmetic", {}, {}),
    ("linear", {}, {}),
    ("passthrough", {}, {}),
    ("slerp", {"t": 0.3}, {}),
    ("ties", {"density": 0.3}, {}),
    ("ties", {"density": 0.3}, {"tie": "index"}),
    ("ties", {"density": 0.3}, {"dialect": "paper"}),
    ("ties", {"density": 0.3}, {"dialect": "fusion_bench_max"}),
    ("dare_linear", {"density": 0.5}, {}),
    ("dare_ties", {"density": 0.5}, {}),
    ("dare_ties", {"density": 0.5}, {"dialect": "paper"}),
    ("della_linear", {"density": 0.5, "epsilon": 0.1}, {}),
    ("della", {"density": 0.5, "epsilon": 0.1}, {"dialect": "paper"}),
    ("della", {"density": 0.5, "epsilon": 0.1}, {}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, {}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}, {}),
    ("sce", {"select_topk": 0.5}, {}),
]
IDS = ["-".join([name, *own.values()]) for name, _, own in METHODS]
MiB = 2**20


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


def merged(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "parameters", "own"), METHODS, ids=IDS)
def test_a_device_changes_no_bit_of_the_merge(
    family: Path, tmp_path: Path, method: str, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    """On a device with room for all, for a few units, for a piece; with much of the host and little."""
    config = recipe(family, method, parameters, **own)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    backend = load("cpp-scalar")
    for number, (device_memory, memory, resumable) in enumerate(
        [(None, None, False), (4 * MiB, None, True), (3 * MiB, 4 * MiB, False)]
    ):
        device = HostDouble(backend, seed=number, resumable=resumable)
        out = tmp_path / str(number)
        report = merge_on(device, config, out, device_memory=device_memory, memory=memory)
        assert merged(out) == merged(tmp_path / "cpu"), (device_memory, memory)
        assert report.device == "cuda:0"
        assert 0 < report.device_peak_bytes <= report.planned_device_peak_bytes <= (device_memory or 10**9)
        assert all(device.counts.values()) or method == "passthrough"


@pytest.mark.parametrize(("method", "parameters", "own"), [METHODS[4], METHODS[13]])
def test_a_backend_with_too_much_scratch_merges_there_in_pieces(
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    own: dict[str, Any],
) -> None:
    """The reference sorts whole tensors, which is not planned, and the limit holds."""
    monkeypatch.setattr(device_plan, "SCRATCH_BYTES", 9 * MiB)
    config = recipe(family, method, parameters, **own)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    device = HostDouble(load("reference"), limit_scratch=True)
    report = merge_on(device, config, tmp_path / "out", device_memory=13 * MiB)
    assert merged(tmp_path / "out") == merged(tmp_path / "cpu")
    assert device.n_drains > 1, "the limit was met"
    assert report.device_peak_bytes <= report.planned_device_peak_bytes <= 13 * MiB


def kinds(plan: tvfast.checkpoints.Plan) -> set[str]:
    """How units meet the device."""
    return {
        ("through" if unit.chunk_bytes else "together")
        if unit.resident
        else ("streamed" if unit.chunk_bytes else "in pieces")
        for unit in plan.units
    }


LITTLE = {"device_memory": 3 * MiB, "memory": 4 * MiB}
MEMORIES: list[tuple[dict[str, Any], dict[str, int], str]] = [
    ({}, {}, "through"),
    ({}, {"device_memory": 4 * MiB}, "in pieces"),
    ({}, LITTLE, "streamed"),
    ({"dialect": "paper"}, {}, "through"),
    ({"dialect": "paper"}, LITTLE, "streamed"),
]
WAYS = ["through", "in-pieces", "streamed", "model-through", "model-streamed"]


@pytest.mark.parametrize(("own", "memories", "kind"), MEMORIES, ids=WAYS)
def test_memory_decides_how_a_tensor_meets_the_device(
    family: Path, own: dict[str, Any], memories: dict[str, int], kind: str
) -> None:
    with using(HostDouble(load("cpp-scalar"), resumable=False)):
        plan = tvfast.plan(recipe(family, "ties", {"density": 0.3}, **own), device="cuda", **memories)
    assert kind in kinds(plan)
    assert "together" in kinds(plan)
    assert plan.device is not None
    assert plan.device.peak_bytes <= memories.get("device_memory", 10**9)
    assert plan.peak_bytes <= memories.get("memory", 10**9)
    assert plan.n_passes == (2 if kind == "streamed" else 1)
    assert bool(plan.device.notes) == (kind in ("in pieces", "streamed"))
    assert all("measured on the CPU, combined on cuda:0 in pieces" in note for note in plan.device.notes)


@pytest.mark.parametrize("method", ["ties", "della", "task_arithmetic"])
@pytest.mark.parametrize("n_examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_any_memory_and_any_order_give_the_same_bytes(
    family: Path, tmp_path: Path, method: str, n_examples: int
) -> None:
    config = recipe(family, method, {} if method == "task_arithmetic" else {"density": 0.5})
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    drawn = random.Random(n_examples)
    n_merged = 0
    while n_merged < n_examples:
        device = HostDouble(load("cpp-scalar"), seed=drawn.randrange(1000), resumable=drawn.random() < 0.5)
        limits = {
            "device_memory": int(2 ** drawn.uniform(20.5, 24)),
            "memory": drawn.choice([None, int(2 ** drawn.uniform(21, 24))]),
            "threads": drawn.randrange(1, 9),
        }
        out = tmp_path / str(n_merged)
        with using(device):
            try:
                tvfast.plan(config, device="cuda", **limits)
            except ArgumentError:
                continue  # less than the least
        report = merge_on(device, config, out, **limits)
        n_merged += 1
        assert merged(out) == merged(tmp_path / "cpu"), limits
        assert report.device_peak_bytes <= report.planned_device_peak_bytes <= limits["device_memory"]
        assert report.planned_peak_bytes <= (limits["memory"] or 10**9)


def test_the_least_device_memory_that_is_named_is_enough(family: Path, tmp_path: Path) -> None:
    config = recipe(family, "ties", {"density": 0.3})
    with pytest.raises(ArgumentError, match=r"cuda:0: a device memory of 1000 bytes, .* allowed") as found:
        merge_on(HostDouble(load("cpp-scalar")), config, tmp_path / "out", device_memory=1000)
    assert not (tmp_path / "out").exists()
    least = int(str(found.value).split("at least ")[1].split()[0])
    merge_on(HostDouble(load("cpp-scalar")), config, tmp_path / "out", device_memory=least)
    with pytest.raises(ArgumentError, match="needs at least"):
        merge_on(HostDouble(load("cpp-scalar")), config, tmp_path / "less", device_memory=least - 1)
    small = HostDouble(load("cpp-scalar"), total_bytes=least - 1)
    with pytest.raises(ArgumentError, match=r"which is what is free, is too little"):
        merge_on(small, config, tmp_path / "free", device_memory=2 * least)


# -- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "memories", "kind"), MEMORIES, ids=WAYS)
@pytest.mark.parametrize("queue", ["upload", "compute", "download"])
def test_a_device_that_fails_is_named_and_resume_gives_the_same_bytes(
    family: Path, tmp_path: Path, own: dict[str, Any], memories: dict[str, int], kind: str, queue: str
) -> None:
    """At the moment of the call, or when the queue comes to it."""
    config = recipe(family, "ties", {"density": 0.3}, **own)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")

    def fails_at(number: int) -> Any:
        def fault(found: str, at: int) -> None:
            if (found, at) == (queue, number):
                raise MergeError(f"cuda:0: {queue} {number} broke")

        return fault

    backend, out = load("cpp-scalar"), tmp_path / "out"
    for number, when in ((3, "fault"), (0, "late_fault")):
        device = HostDouble(backend, seed=number, resumable=False, **{when: fails_at(number)})
        with pytest.raises(MergeError, match=f"{queue} {number} broke"):
            merge_on(device, config, out, resume=True, **memories)
        assert not (out / "model.safetensors").exists()
    merge_on(HostDouble(backend, seed=5), config, out, resume=True)
    assert merged(out) == merged(tmp_path / "cpu")


@pytest.mark.parametrize(("own", "memories", "kind"), MEMORIES, ids=WAYS)
def test_a_computation_without_memory_is_done_in_smaller_pieces(
    family: Path, tmp_path: Path, own: dict[str, Any], memories: dict[str, int], kind: str
) -> None:
    """Memory is short whenever there is much to do; more and more of the work has to be repeated."""
    config = recipe(family, "ties", {"density": 0.3}, **own)
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")
    n_short = 0
    for every, n_times in ((7, 1), (2, 2)):
        device = HostDouble(load("cpp-scalar"), seed=every, resumable=False)
        device.fault = memory_is_short(every, n_times)
        out = tmp_path / str(every)
        try:
            merge_on(device, config, out, **memories)
        except OutOfDeviceMemory:  # of the smallest piece too
            merge_on(HostDouble(load("cpp-scalar")), config, out, resume=True, **memories)
        assert merged(out) == merged(tmp_path / "cpu")
        n_short += device.n_drains - 1
    assert n_short > 3


def memory_is_short(every: int, n_times: int) -> Fault:
    """For one computation of so many, so many times, found out when the backend is at work."""
    found: Counter[int] = Counter()

    def fault(queue: str, number: int) -> None:
        if queue == "compute" and number % (2 * every) == 1 and found[number] < n_times:
            found[number] += 1
            raise OutOfDeviceMemory("cuda:0: none left")

    return fault


def test_a_device_without_any_memory_left_is_named(family: Path, tmp_path: Path) -> None:
    config = recipe(family, "ties", {"density": 0.3})
    tvfast.merge_checkpoints(config, tmp_path / "cpu", device="cpu")

    def fault(queue: str, number: int) -> None:
        if queue == "compute" and number % 2:
            raise OutOfDeviceMemory("cuda:0: none left")

    out = tmp_path / "out"
    says = (
        r"tensor '.*': cuda:0: none left, though only 65536 elements were to be combined at a time. Free mem"
    )
    with pytest.raises(OutOfDeviceMemory, match=says):
        merge_on(HostDouble(load("cpp-scalar"), fault=fault), config, out)
    assert not (out / "model.safetensors").exists()
    tvfast.merge_checkpoints(config, out, device="cpu", resume=True)
    assert merged(out) == merged(tmp_path / "cpu")


@pytest.mark.parametrize(("own", "memories", "kind"), MEMORIES, ids=WAYS)
def test_a_value_that_is_not_finite_is_named_and_may_go_through(
    family: Path, tmp_path: Path, own: dict[str, Any], memories: dict[str, int], kind: str
) -> None:
    tensors = load_file(family / "ft2" / "model.safetensors")
    tensors["embed.weight"].view(-1)[300_003] = float("nan")
    (tmp_path / "ft2").mkdir()
    save_file(tensors, tmp_path / "ft2" / "model.safetensors")
    config = recipe(family, "ties", {"density": 0.3}, **own)
    config["models"][1]["model"] = str(tmp_path / "ft2")
    device = HostDouble(load("cpp-scalar"), seed=1, resumable=False)
    with pytest.raises(MergeError, match=r"tensor 'embed.weight' holds NaN or infinity at element 300003"):
        merge_on(device, config, tmp_path / "out", **memories)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    device = HostDouble(load("cpp-scalar"), seed=2, resumable=False)
    merge_on(device, config, tmp_path / "out", nonfinite="propagate", resume=True, **memories)
    found = load_file(tmp_path / "out" / "model.safetensors")["embed.weight"].view(-1)
    assert found.isnan().nonzero().tolist() == [[300_003]]


@pytest.mark.parametrize(("own", "memories", "kind"), MEMORIES, ids=WAYS)
def test_a_result_that_its_type_cannot_hold_is_named(
    family: Path, tmp_path: Path, own: dict[str, Any], memories: dict[str, int], kind: str
) -> None:
    config = recipe(family, "ties", {"density": 0.3, "lambda": 3e7}, **own) | {"out_dtype": "float16"}
    with pytest.raises(MergeError, match=r"element \d+ of the result .* too large for float16"):
        merge_on(HostDouble(load("cpp-scalar"), seed=1), config, tmp_path / "out", **memories)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# -- odd inputs -----------------------------------------------------------------------------------------


def test_mixed_types_and_arrays_at_odd_places(tmp_path: Path) -> None:
    """Members in different types, results in a third, and tensors that begin anywhere in their files."""
    drawn = torch.Generator().manual_seed(3)
    kinds_of = dict(zip(MEMBERS, (torch.float32, torch.bfloat16, torch.float16, torch.float32), strict=True))
    shapes = {"a": (7,), "b": (333, 3), "c": (1,), "d": (50, 1001), "e": (5, 1, 3)}
    base = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    for member, kind in kinds_of.items():
        (tmp_path / member).mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for place, (name, values) in enumerate(base.items()):
            tensors[name] = (values + (member != "base") * 0.01 * values.roll(1)).to(kind)
            tensors[f"{name}.mask"] = torch.ones(2 * place + 1, dtype=torch.bool)
        save_file(tensors, tmp_path / member / "model.safetensors")
    # safetensors sorts by size of element; a header of our own puts masks between the others
    for member in MEMBERS:
        _interleave(tmp_path / member / "model.safetensors")
    found = open_checkpoint(str(tmp_path / "base")).tensors
    assert any(found[name].offset % 4 for name in shapes)
    for method, parameters in (("ties", {"density": 0.3}), ("dare_ties", {"density": 0.4})):
        config = recipe(tmp_path, method, parameters) | {"out_dtype": "float16"}
        tvfast.merge_checkpoints(config, tmp_path / method, device="cpu")
        device = HostDouble(load("cpp-scalar"), seed=4)
        merge_on(device, config, tmp_path / f"{method}-device")
        assert merged(tmp_path / f"{method}-device") == merged(tmp_path / method)


def _interleave(path: Path) -> None:
    """The same tensors in alphabetical order."""
    tensors = load_file(path)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL"}
    header: dict[str, Any] = {}
    data = b""
    for name in sorted(tensors):
        raw = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
