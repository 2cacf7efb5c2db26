"""Alternating tuning and merging in one process: what a round is, resuming, every kind of merge, errors."""

from __future__ import annotations

import copy
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tvfast
from tests.loops.networks import Task, equal, network, task, tasks, tune, weights
from tvfast.errors import (
    ArgumentError,
    CheckpointError,
    OutputError,
    ShapeError,
    StateDictError,
    UnknownNameError,
)
from tvfast.loops import Turn, alternate
from tvfast.loops.alternating import seeded, turn_seed

State = dict[str, torch.Tensor]


def experts_of(model: nn.Module, given: dict[str, Task], number: int = 1, seed: int = 0) -> list[State]:
    """What every task makes of the model, by itself."""
    found = []
    for name, data in given.items():
        one = copy.deepcopy(model)
        with seeded(turn_seed(seed, number, name)):
            tune(one, data)
        found.append(weights(one))
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("with_state", [False, True])
def test_one_round_is_the_mean_of_task_arithmetic_bit_for_bit(tmp_path: Path, with_state: bool) -> None:
    model = network()
    base, experts = weights(model), experts_of(model, tasks())
    done = alternate(model, tasks(), tune, rounds=1, state=tmp_path / "state" if with_state else None)
    assert [one.number for one in done.rounds] == [1]
    assert equal(weights(model), tvfast.merge(base, experts, "task_arithmetic", normalize=True))
    mean = {name: torch.stack([e[name].double() for e in experts]).mean(0) for name in base}
    for name, tensor in weights(model).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), mean[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("merge", "parameters"),
    [
        ("task_arithmetic", {"normalize": False, "weights": [0.5, 0.25, 1.0]}),
        ("ties", {"density": 0.4, "dialect": "paper"}),
        ("dare_linear", {"density": 0.5}),
        ("linear", {}),
    ],
)
@pytest.mark.parametrize("with_state", [False, True])
def test_task_vectors_are_taken_against_the_weights_of_the_round(
    tmp_path: Path, merge: str, parameters: dict[str, Any], with_state: bool
) -> None:
    model, scales = network(), [1.0, 0.5, 0.75]
    alternate(
        model,
        tasks(),
        tune,
        rounds=3,
        merge=merge,
        scale=scales,
        seed=5,
        state=tmp_path / "state" if with_state else None,
        **parameters,
    )
    expected = network()
    for number, scale in enumerate(scales, start=1):
        base, experts = weights(expected), experts_of(expected, tasks(), number, seed=5)
        merged = tvfast.merge(base, experts, merge, scale=scale, seed=5 + number - 1, **parameters)
        expected.load_state_dict(merged)
    assert equal(weights(model), weights(expected))


class Stop(Exception):
    """The power goes out."""


def failing(turns: int) -> Any:
    """A tuning that fails in the middle of one turn, after it has changed weights."""
    left = [turns]

    def tune_or_stop(model: nn.Module, data: Task) -> None:
        tune(model, data)
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return tune_or_stop


@pytest.mark.parametrize("turns", range(7))
def test_an_interrupted_loop_goes_on_to_the_same_weights(tmp_path: Path, turns: int) -> None:
    whole = network()
    alternate(whole, tasks(), tune, rounds=3, merge="ties", density=0.5)
    model, begun = network(), weights(network())
    with pytest.raises(Stop):
        alternate(model, tasks(), failing(turns), rounds=3, merge="ties", density=0.5, state=tmp_path)
    assert (turns < 3) == equal(weights(model), begun), "the weights of the round, not those of half a turn"
    told: list[Turn[Task]] = []
    other = network(seed=9)  # what it holds does not matter any more
    done = alternate(
        other, tasks(), tune, rounds=3, merge="ties", density=0.5, state=tmp_path, before_turn=told.append
    )
    assert done.resumed_after == turns // 3
    assert len(told) == 9 - turns
    assert equal(weights(other), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["round-0003.safetensors"]
    assert equal(load_file(tmp_path / "round-0003.safetensors"), weights(whole))
    third = network(seed=4)
    assert (
        alternate(third, tasks(), failing(0), rounds=3, merge="ties", density=0.5, state=tmp_path).rounds
        == ()
    )
    assert equal(weights(third), weights(whole))


def test_more_rounds_go_on_from_the_last(tmp_path: Path) -> None:
    whole, model = network(), network()
    alternate(whole, tasks(), tune, rounds=2)
    alternate(model, tasks(), tune, rounds=1, state=tmp_path)
    assert alternate(model, tasks(), tune, rounds=2, scale=[1.0, 1.0], state=tmp_path).resumed_after == 1
    assert equal(weights(model), weights(whole))
    with pytest.raises(ArgumentError, match="holds round 2; expected at most rounds=1"):
        alternate(model, tasks(), tune, rounds=1, state=tmp_path)


def test_turns_are_told_and_rounds_are_reported() -> None:
    model = network()
    told: list[tuple[int, int, int, str]] = []
    found = alternate(
        model,
        tasks(),
        tune,
        rounds=2,
        scale=[1.0, 0.5],
        before_turn=lambda turn: told.append((turn.round, turn.rounds, turn.index, turn.name)),
        after_round=lambda model, number: (number, model[0].weight.sum().item()),
    )
    assert told == [(k, 2, i, name) for k in (1, 2) for i, name in enumerate(("red", "green", "blue"))]
    assert [(one.number, one.scale, one.result[0]) for one in found.rounds] == [(1, 1.0, 1), (2, 0.5, 2)]
    assert found.rounds[1].result[1] == model[0].weight.sum().item()
    assert found.resumed_after is None


def test_the_callers_generators_and_modes_are_as_before() -> None:
    model = network()
    model[1].eval()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    alternate(model, list(tasks().values()), tune, rounds=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert [module.training for module in model] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_parameters_and_other_types_stay_what_they_are(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3, dtype=torch.bfloat16)
            self.head = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
            self.head.weight = self.embed.weight
            self.bias = nn.Parameter(torch.zeros(3))
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("none", torch.zeros(0, 4))

    def nudge(model: Tied, by: float) -> None:
        with torch.no_grad():
            model.embed.weight.add_(by)
            model.bias.add_(by)

    torch.manual_seed(0)
    model = Tied()
    before = weights(model)
    twin = copy.deepcopy(model)
    alternate(model, [1.0, 3.0], nudge, rounds=2, state=tmp_path)
    assert model.head.weight is model.embed.weight
    expected = twin
    alternate(expected, [1.0, 3.0], nudge, rounds=2)
    assert equal(weights(model), weights(expected))
    assert torch.equal(model.bias, before["bias"] + 4.0)
    assert "head.weight" not in load_file(tmp_path / "round-0002.safetensors")


def test_weights_in_a_dict() -> None:
    state = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.int64)}

    def add(weights: dict[str, torch.Tensor], by: float) -> None:
        weights["a"] += by

    alternate(state, {"x": 1.0, "y": 2.0}, add, rounds=2)
    assert state["a"].tolist() == [3.0] * 3
    assert state["b"].tolist() == [1, 1]


# -- other merges and beginnings ------------------------------------------------------------------------


def test_post_hoc_from_a_merged_model_on_validation_data(tmp_path: Path) -> None:
    base = weights(network())
    experts = experts_of(network(), tasks())
    merged = tvfast.merge(base, experts, "ties", density=0.3)
    validation = {name: (x[:8], y[:8]) for name, (x, y) in tasks().items()}
    in_place = network()
    in_place.load_state_dict(merged)
    alternate(in_place, validation, tune, rounds=2)
    for start in (merged, tmp_path / "merged"):
        (tmp_path / "merged").mkdir(exist_ok=True)
        save_file(merged, tmp_path / "merged" / "model.safetensors")
        model = network(seed=7)
        alternate(model, validation, tune, rounds=2, start=start)
        assert equal(weights(model), weights(in_place))
    assert not equal(weights(in_place), merged)


def test_merges_that_read_statistics_of_the_experts(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Task) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def plain(seed: int = 0) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def collect(model: nn.Module, data: Task) -> Any:
        return tvfast.importance.collect(model, losses, [data], kind="fisher")

    model = plain()
    alternate(model, tasks(), tune, rounds=1, merge="fisher", collect=collect)
    base, experts = weights(plain()), experts_of(plain(), tasks())
    stats = []
    for expert, data in zip(experts, tasks().values(), strict=True):
        one = plain()
        one.load_state_dict(expert)
        stats.append(collect(one, data))
    assert equal(weights(model), tvfast.merge(base, experts, "fisher", stats=stats))
    again = plain(3)
    alternate(again, tasks(), tune, rounds=1, merge="fisher", collect=collect, start=base, state=tmp_path)
    assert equal(weights(again), weights(model))
    with pytest.raises(ArgumentError, match="'fisher' reads statistics of every model; expected collect"):
        alternate(model, tasks(), tune, rounds=1, merge="fisher")
    with pytest.raises(ArgumentError, match="'ties' reads no statistics"):
        alternate(model, tasks(), tune, rounds=1, merge="ties", collect=collect)


def test_lata_compares_with_an_instruct_model_in_every_round() -> None:
    model, instruct = network(), network(seed=1)
    alternate(model, tasks(), tune, rounds=1, merge="lata", instruct=instruct, target="base")
    wanted = tvfast.merge(
        weights(network()), experts_of(network(), tasks()), "lata", instruct=weights(instruct), target="base"
    )
    assert equal(weights(model), wanted)


# -- errors -----------------------------------------------------------------------------------------------


def never(model: nn.Module, data: Task) -> None:
    raise AssertionError("nothing may be tuned")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"rounds": 0}, ArgumentError, "rounds is 0; expected a whole number of 1 or more"),
        ({"rounds": 1.0}, ArgumentError, "rounds is 1.0"),
        ({"scale": [1.0]}, ArgumentError, "scale has 1 values for 2 rounds"),
        ({"tasks": []}, ArgumentError, "got 0 models"),
        ({"tasks": "red"}, ArgumentError, "tasks is a str; expected a dict or a list"),
        ({"tasks": ["a", "a"]}, ArgumentError, "tasks has 'a' twice"),
        ({"tune": None}, ArgumentError, "tune is None; expected a function"),
        ({"model": torch.ones(3)}, ArgumentError, "model is a Tensor"),
        ({"merge": "tiess"}, UnknownNameError, "did you mean 'ties'"),
        ({"merge": "ties", "density": 2.0}, ArgumentError, "density is 2.0"),
        ({"weights": [1.0]}, ArgumentError, "weights has 1 values for 3 models"),
        ({"merge": "lata"}, ArgumentError, "'lata' needs instruct"),
        ({"parallel": "all"}, ArgumentError, "parallel is 'all'; expected one of 'tasks', 'tuning'"),
        ({"start": {"a": torch.ones(2)}}, StateDictError, "start has no tensor '0.weight'"),
        ({"start": "no/such/folder"}, CheckpointError, "no/such/folder"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_tuned(
    given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    arguments = {"model": network(), "tasks": tasks(), "tune": never, "rounds": 2, **given}
    with pytest.raises(kind, match=message):
        alternate(**arguments)


def test_a_start_of_another_shape() -> None:
    other = weights(network()) | {"0.weight": torch.ones(2, 2)}
    with pytest.raises(
        ShapeError, match=r"start: tensor '0.weight' has shape \[2, 2\], the model's has \[9, 6\]"
    ):
        alternate(network(), tasks(), never, rounds=1, start=other)


def test_state_folders_of_others(tmp_path: Path) -> None:
    alternate(network(), tasks(), tune, rounds=1, state=tmp_path / "mine")
    with pytest.raises(
        ArgumentError, match=r"round-0001.*holds a loop with merge 'task_arithmetic', this one has 'ties'"
    ):
        alternate(network(), tasks(), never, rounds=2, merge="ties", state=tmp_path / "mine")
    with pytest.raises(ArgumentError, match=r"holds a loop with scale \[1.0\], this one has \[0.5\]"):
        alternate(network(), tasks(), never, rounds=2, scale=0.5, state=tmp_path / "mine")
    with pytest.raises(ArgumentError, match="holds a loop with tasks"):
        alternate(network(), {"red": task(1)}, never, rounds=2, state=tmp_path / "mine")
    (tmp_path / "other").mkdir()
    save_file(weights(network()), tmp_path / "other" / "round-0001.safetensors")
    with pytest.raises(CheckpointError, match="no state of a loop"):
        alternate(network(), tasks(), never, rounds=2, state=tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        alternate(network(), tasks(), never, rounds=1, state=tmp_path / "file" / "state")


def test_what_a_killed_run_left_is_removed_when_it_goes_on(tmp_path: Path) -> None:
    """Killed behind the rename of round 1 with what led to it in place, and with an expert of round 2."""
    with pytest.raises(Stop):
        alternate(network(), tasks(), failing(4), rounds=3, state=tmp_path)
    expert = tmp_path / "round-0002-task-0000.safetensors"
    for name in ("round-0000", "round-0001-task-0002"):
        shutil.copy(expert, tmp_path / f"{name}.safetensors")
    with pytest.raises(Stop):
        alternate(network(), tasks(), failing(0), rounds=3, state=tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "round-0001.safetensors", expert]


def test_files_of_others_stay_in_the_state_folder(tmp_path: Path) -> None:
    names = ["round-0001.safetensors.bak", "round-best.safetensors", "round-1-task-0.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "round-0001-task-0000.safetensors.unfinished").write_text("of a loop that was killed")
    alternate(network(), tasks(), tune, rounds=2, scale=[1.0, 0.5], state=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "round-0002.safetensors"])


# -- memory -------------------------------------------------------------------------------------------------

PEAK = """
import sys, tempfile, threading, time
import torch
import tvfast
from tvfast.loops import alternate

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

n, with_state = 2**23, sys.argv[1] == "state"
model = {"layers.0.w": torch.zeros(n), "layers.1.w": torch.zeros(n)}
for tensor in model.values():
    tensor.normal_()
tvfast.merge_([torch.zeros(2)], [[torch.ones(2)]], method="ties", density=0.5)
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()

def nudge(weights, by):
    for tensor in weights.values():
        tensor.add_(by)

with tempfile.TemporaryDirectory() as folder:
    state = folder if with_state else None
    alternate(model, [1.0, 2.0, 3.0, 4.0], nudge, rounds=2, merge="ties", density=0.5, state=state)
done.set()
thread.join()
print((peak[0] - before) * 1024 / (8 * n))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("kind", "copies"), [("memory", 4), ("state", 1)])
def test_memory_beside_the_model(kind: str, copies: int) -> None:
    """Copies of the model with four tasks: all but the last and the round's weights, or these alone."""
    done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert copies - 0.1 < float(done.stdout) < copies + 0.9, done.stdout
