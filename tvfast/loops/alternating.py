"""Alternating tuning and merging: every task is tuned from the same weights, which the merge then moves."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

import tvfast
from tvfast._leaves import Weights
from tvfast.errors import ArgumentError
from tvfast.loops import live
from tvfast.loops.ranks import Ranks
from tvfast.loops.start import weights_at
from tvfast.loops.state import LoopState

M = TypeVar("M", bound=Weights)
T = TypeVar("T")

PARALLEL = ("tasks", "tuning")
_MEAN = {"normalize": True}  # of task arithmetic, unless the caller says otherwise


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """One tuning of one task.

    Attributes:
        round: from 1.
        rounds: how many there are.
        index, name, task: of the task.
        seed: of torch's, Python's and NumPy's generators during the turn; a function of the loop's seed, the
            round and the name of the task.
    """

    round: int
    rounds: int
    index: int
    name: str
    task: T
    seed: int


@dataclass(frozen=True, slots=True)
class Round:
    """One round that was carried out.

    Attributes:
        number: from 1.
        scale: λ of its merge.
        seconds: of tuning and merging, in this process.
        result: what `after_round` returned.
    """

    number: int
    scale: float
    seconds: float
    result: Any


@dataclass(frozen=True, slots=True)
class Alternation:
    """What a loop did.

    Attributes:
        rounds: those that this call carried out, in order.
        resumed_after: the round whose weights were found in the state folder; None: it began anew.
    """

    rounds: tuple[Round, ...]
    resumed_after: int | None


def alternate(
    model: M,
    tasks: Mapping[str, T] | Sequence[T],
    tune: Callable[[M, T], object],
    *,
    rounds: int,
    merge: str = "task_arithmetic",
    scale: float | Sequence[float] = 1.0,
    start: Weights | str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    collect: Callable[[M, T], Any] | None = None,
    before_turn: Callable[[Turn[T]], object] | None = None,
    after_round: Callable[[M, int], Any] | None = None,
    seed: int = 0,
    parallel: str = "tasks",
    n_threads: int = 0,
    **parameters: Any,
) -> Alternation:
    """Alternate tuning and merging (ATM), in place.

    In round k every task is tuned from θ^(k-1), and θ^(k) = merge(θ^(k-1), θ_1 ... θ_T): task vectors are
    differences to the weights of the round, not to those that the loop began with. With the default merge
    and λ = 1, θ^(k) is the mean of the tuned models.

    Args:
        model: module, or list or dict of tensors; holds θ^(rounds) in the end. Its parameters and persistent
            buffers take part; all else that a module holds is left as `tune` leaves it.
        tasks: by name, or a list; whatever `tune` understands. Names of a list are its strings, or numbers.
        tune: tunes the model in place on one task. It makes its own optimiser each time.
        rounds: how many, at least 1.
        merge: method of `tvfast.merge_`. For "task_arithmetic" `normalize` is True unless given.
        scale: λ of the merge; one, or one per round.
        start: θ^(0), where it is not what the model holds: weights of the same names, or the path or hub id
            of a checkpoint. A merged model and tasks of validation data make it post-hoc ATM.
        state: folder that the weights of every round and expert are saved to. A loop that was interrupted
            goes on from there when it is called again, with the weights that it would have had; one that is
            finished only loads them.
        collect: for methods that read statistics of each model: what `stats` of `tvfast.merge_` takes of one
            expert, made from the model that holds it and its task.
        before_turn: told of every turn of this process before it begins.
        after_round: called with the merged model; what it returns is in the report.
        seed: of all turns, and of random draws of the merge in round k: seed + k - 1.
        parallel: under torchrun: "tasks", every process tunes its share of the tasks, task t in process
            t mod W; "tuning", all processes tune every task together, as DistributedDataParallel does in
            `tune`. Both give every process the merged weights.
        n_threads: of the merge; 0 is all cores that the process may use. Does not change the result.
        **parameters: of the method, as for `tvfast.merge_`: `density`, `weights`, `instruct` ...

    Returns:
        What was done.

    Raises:
        ArgumentError: wrong arguments, before anything is tuned; processes that differ; a state folder of
            another loop.
        StateDictError, ShapeError: `start` does not fit the model.
        CheckpointError: `start` or the state folder is damaged.
        OutputError: the state cannot be written.
        MergeError: another process failed.

    Notes:
        Memory beside the model and what `tune` takes: a copy of its tensors, and one for every task but the
        last (for every task with `collect`, or where processes share the tasks). With `state` experts are
        mapped from their files and merged on the host: one copy there, whatever the number of tasks. What
        `tune` draws comes from seeded generators; the caller's are as before afterwards. Gradients are
        dropped after each turn, and modules go back into training or evaluation, as they were. Where a turn
        fails, the model holds the weights of its round again.

    Source: Alternating Tuning and Merging 2024, arXiv:2411.03055.
    """
    loop = _Loop(
        model=model,
        names=_names(tasks),
        tasks=list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks),
        tune=tune,
        rounds=rounds,
        method=merge,
        scales=_scales(scale, rounds),
        parameters={**(_MEAN if merge == "task_arithmetic" else {}), **parameters},
        collect=collect,
        before_turn=before_turn,
        seed=seed,
        n_threads=n_threads,
        ranks=Ranks(_checked_parallel(parallel)),
    )
    loop.check()
    kept = None if state is None else LoopState(state, loop.settings(), loop.scales)
    resumed = loop.begin(start, kept)
    found = []
    with live.modes_kept(model):
        for number in range(1 + (resumed or 0), rounds + 1):
            began = time.perf_counter()
            loop.carry_out(number, kept)
            result = None if after_round is None else after_round(model, number)
            found.append(Round(number, loop.scales[number - 1], time.perf_counter() - began, result))
    return Alternation(tuple(found), resumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loop(Generic[M, T]):
    """Arguments of `alternate`, and the steps of a round."""

    model: M
    names: list[str]
    tasks: list[T]
    tune: Callable[[M, T], object]
    rounds: int
    method: str
    scales: Sequence[float]
    parameters: dict[str, Any]
    collect: Callable[[M, T], Any] | None
    before_turn: Callable[[Turn[T]], object] | None
    seed: int
    n_threads: int
    ranks: Ranks

    def check(self) -> None:
        """
        Raises:
            ArgumentError: what a merge would refuse after the first round of tuning.
        """
        if not callable(self.tune):
            raise ArgumentError(f"tune is {self.tune!r}; expected a function of a model and a task.")
        if isinstance(self.model, Tensor):
            raise ArgumentError("model is a Tensor; expected a module, or a list or dict of tensors.")
        own = {key: value for key, value in self.parameters.items() if key != "instruct"}
        method = tvfast.methods.make_method(self.method, scale=self.scales[0], seed=self.seed, **own)
        method.check_models(len(self.tasks))
        if method.info.needs_instruct and self.parameters.get("instruct") is None:
            raise ArgumentError(f"method {self.method!r} needs instruct, an instruct model; found none.")
        reads = bool(method.info.needs_scores or method.statistics)
        if reads and self.collect is None:
            raise ArgumentError(
                f"method {self.method!r} reads statistics of every model; expected collect, a function of a "
                "model and a task that collects them."
            )
        if self.collect is not None and not reads:
            raise ArgumentError(f"method {self.method!r} reads no statistics; expected collect=None.")

    def settings(self) -> dict[str, Any]:
        """What all runs of this loop share."""
        numbers = {key: value for key, value in self.parameters.items() if key != "instruct"}
        return {
            "tasks": self.names,
            "merge": self.method,
            "parameters": {key: _plain(value) for key, value in sorted(numbers.items())},
            "seed": self.seed,
        }

    def begin(self, start: Weights | str | os.PathLike[str] | None, kept: LoopState | None) -> int | None:
        """Put θ^(0), or what the state folder has, into the model; the round that it has."""
        self.ranks.check_same("the loop", {**self.settings(), "scale": self.scales})
        last = None
        if kept is not None:
            last = kept.last_round()
            if last is not None and last > self.rounds:
                raise ArgumentError(
                    f"{kept.folder}: holds round {last}; expected at most rounds={self.rounds}. Ask for more "
                    "rounds, or name another state folder."
                )
            self.ranks.check_same("the last round in the state folder", last)
        if kept is not None and last is not None:
            if self.ranks.rank == 0:
                kept.tidy(last)
            live.load(self.model, kept.read_round(last), str(kept.round_path(last)))
            return last
        if start is not None:
            found, what = weights_at(start)
            live.load(self.model, found, what)
        self.ranks.check_same("the checksum of the start weights", live.checksum(self.model))
        if kept is not None and self.ranks.rank == 0:
            kept.save_round(0, live.tensors_of(self.model)[0])
        self.ranks.meet(None)
        return None

    def carry_out(self, number: int, kept: LoopState | None) -> None:
        """Tune every task from the weights that the model holds, and merge."""
        base = live.copied(self.model) if kept is None else kept.read_round(number - 1)
        aliases = live.tensors_of(self.model)[1]
        experts = self._tuned(number, base, kept)
        own: dict[str, Any] = dict(self.parameters)
        if self.collect is not None:
            own["stats"] = self._collected(experts)
        tvfast.merge_(
            _named(base, aliases),
            [_named(expert, aliases) for expert in experts],
            self.method,
            scale=self.scales[number - 1],
            seed=self.seed + number - 1,
            n_threads=self.n_threads,
            **own,
        )
        live.load(self.model, base, "the merged weights")
        if kept is not None:
            self.ranks.meet(None)  # everyone has read the experts before they are removed
            if self.ranks.rank == 0:
                kept.save_round(number, base)
            self.ranks.meet(None)

    def _tuned(self, number: int, base: live.State, kept: LoopState | None) -> list[live.State]:
        """The experts of a round, in the order of the tasks."""
        experts: list[live.State] = []
        failure: BaseException | None = None
        last = len(self.tasks) - 1
        found = [kept is not None and kept.has_expert(number, index) for index in range(len(self.tasks))]
        done = self.ranks.gathered(found)[0]
        try:
            for index in range(len(self.tasks)):
                mine = self.ranks.tunes(index) and not done[index]
                if mine:
                    self._turn(number, index, base)
                if kept is not None:
                    if mine and self.ranks.keeps(index):
                        kept.save_expert(number, index, live.tensors_of(self.model)[0])
                elif self.ranks.shares_tasks and not mine:
                    experts.append({name: torch.empty_like(tensor) for name, tensor in base.items()})
                elif index == last and self.collect is None and not self.ranks.shares_tasks:
                    experts.append(live.tensors_of(self.model)[0])
                else:
                    experts.append(live.copied(self.model))
        except BaseException as error:
            failure = error
        try:
            self.ranks.meet(failure)
        except BaseException:
            live.load(self.model, base, "the weights of the round")
            raise
        if kept is not None:
            return [kept.read_expert(number, index) for index in range(len(self.tasks))]
        if self.ranks.shares_tasks:
            self.ranks.exchange(experts)
        return experts

    def _turn(self, number: int, index: int, base: live.State) -> None:
        turn = Turn(
            number,
            self.rounds,
            index,
            self.names[index],
            self.tasks[index],
            turn_seed(self.seed, number, self.names[index]),
        )
        live.load(self.model, base, "the weights of the round")
        if self.before_turn is not None:
            self.before_turn(turn)
        with live.modes_kept(self.model), seeded(turn.seed):
            self.tune(self.model, turn.task)
        live.drop_gradients(self.model)

    def _collected(self, experts: Sequence[live.State]) -> list[Any]:
        assert self.collect is not None
        found = []
        for name, expert, task in zip(self.names, experts, self.tasks, strict=True):
            live.load(self.model, expert, f"the expert of {name!r}")
            with live.modes_kept(self.model), seeded(turn_seed(self.seed, 0, name)):
                found.append(self.collect(self.model, task))
            live.drop_gradients(self.model)
        return found


def turn_seed(seed: int, number: int, name: str) -> int:
    """Of 32 bits; does not depend on the order of the tasks."""
    digest = hashlib.blake2b(f"{seed}\0{number}\0{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's, Python's and (where it is loaded) NumPy's generators; they are as before afterwards."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


def _names(tasks: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    """
    Raises:
        ArgumentError: no collection of tasks, or two of one name.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Mapping | Sequence):
        raise ArgumentError(f"tasks is a {type(tasks).__name__}; expected a dict or a list of tasks.")
    names = [
        name if isinstance(name, str) else str(index)
        for index, name in enumerate(tasks.keys() if isinstance(tasks, Mapping) else tasks)
    ]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(f"tasks has {name!r} twice; expected names that differ.")
    return names


def _named(state: live.State, aliases: Mapping[str, str]) -> live.State:
    """With the further names of tied tensors, as the model has them."""
    return {**state, **{alias: state[name] for alias, name in aliases.items()}}


def _scales(scale: float | Sequence[float], rounds: int) -> list[float]:
    """λ of every round.

    Raises:
        ArgumentError: not one, and not one per round; or rounds is no count.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ArgumentError(f"rounds is {rounds!r}; expected a whole number of 1 or more.")
    if not isinstance(scale, Sequence):
        return [float(scale)] * rounds
    if len(scale) != rounds:
        raise ArgumentError(
            f"scale has {len(scale)} values for {rounds} rounds; expected one, or one per round."
        )
    return [float(one) for one in scale]


def _checked_parallel(parallel: str) -> str:
    if parallel not in PARALLEL:
        raise ArgumentError(f"parallel is {parallel!r}; expected one of {', '.join(map(repr, PARALLEL))}.")
    return parallel


def _plain(value: Any) -> Any:
    """A parameter as JSON has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return [float(item) for item in value]
