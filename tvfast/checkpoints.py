"""Merging checkpoints: what `tvfast merge` and `tvfast plan` call. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvfast
from tvfast.checkpoint.layout import Layout, make_layout
from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.binding import Binding, bind
from tvfast.engine.companions import companions
from tvfast.engine.device import NOMINAL, Choice, Device, Traits, choose
from tvfast.engine.inputs import FileState
from tvfast.engine.opening import open_models
from tvfast.engine.output import check_report_folder
from tvfast.engine.plan import Plan, make_plan
from tvfast.engine.run import Progress, Run, Silence
from tvfast.engine.staging import Staging
from tvfast.errors import ArgumentError, RecipeError
from tvfast.recipe import Recipe, load_recipe

__all__ = ["Plan", "Progress", "Recipe", "Report", "load_recipe", "merge_checkpoints", "plan"]

Config = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe: the path of its YAML file, the mapping that such a file holds, or a loaded one."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a merge did. Sizes are bytes.

    Attributes:
        out: the directory.
        dry_run: nothing was written.
        n_tensors: of the output.
        read_bytes, written_bytes: by this run.
        resumed_bytes: found finished and verified.
        finished_before: the directory held this very merge already.
        n_passes: the most often that a tensor was read.
        seconds: of the whole call.
        peak_bytes: largest resident memory of the process so far.
        planned_peak_bytes: what the plan promised.
        device: where tensors were merged: "cpu", or for example "cuda:0".
        device_why: what that is, or why it is not a GPU.
        device_peak_bytes: the most that was allocated on a GPU; 0 on the CPU.
        planned_device_peak_bytes: what the plan promised.
        shards: files with weights.
        warnings: of recipe and files.
    """

    out: str
    dry_run: bool
    n_tensors: int
    read_bytes: int
    written_bytes: int
    resumed_bytes: int
    finished_before: bool
    n_passes: int
    seconds: float
    peak_bytes: int
    planned_peak_bytes: int
    device: str
    device_why: str
    device_peak_bytes: int
    planned_device_peak_bytes: int
    shards: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(
    config: Config,
    *,
    device: str = "auto",
    memory: int | None = None,
    device_memory: int | None = None,
    threads: int = 0,
    seed: int | None = None,
) -> Plan:
    """What a merge would read, write and need; reads headers only.

    Args:
        config: a recipe.
        device: as in `merge_checkpoints`; also "a100", "h100" or "h200", which need not be here.
        device_memory: bound of what is allocated on a GPU, bytes; None: nine tenths of what is free.
        memory: bound of the resident memory, bytes; None: chosen by what the machine has free.
        threads: 0: all cores that the process may use.
        seed: key of random draws; None: the recipe's, or 0.

    Raises:
        RecipeError, UnknownNameError: the recipe.
        CheckpointError: a file is missing or damaged; StatisticsError: statistics, or of another model.
        ArgumentError: `memory` or `device_memory` is too little; the least is named. Models do not fit each
            other.
        BackendError: the device is not here, or no backend can run there.
    """
    _check_device(device, device_memory, NOMINAL)
    limits = _Limits(memory, device_memory, threads)
    return _prepare(config, _destination(device), limits, seed).plan


def merge_checkpoints(
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int = 0,
    memory: int | None = None,
    device_memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    seed: int | None = None,
    nonfinite: str | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Merge checkpoints on disk into a new one, in one pass over the disk where the method allows.

    Args:
        config: a recipe.
        out: directory of the result; it must not exist, or be empty. Everything is staged in a folder inside
            it and renamed when the whole merge is done.
        device: "cpu", "cuda" or for example "cuda:1"; "auto": a GPU where a backend can run on one, otherwise
            the CPU. Does not change the result.
        threads: 0: all cores that the process may use. Does not change the result.
        memory: bound of the resident memory of the process, bytes; None: what keeps disk and cores busy. Does
            not change the result.
        device_memory: bound of what is allocated on a GPU, bytes, the driver's own not counted; None: nine
            tenths of what is free there. Does not change the result.
        resume: continue what is in `out`: nothing, a run that was cut off, or a finished one, which is
            verified.
        overwrite: replace what is in `out`; the old files stay until the new ones are complete.
        dry_run: do everything but read and write tensors.
        seed: key of random draws; None: the recipe's, or 0.
        nonfinite: "error" refuses NaN and infinity in an input, "propagate" lets them through; None: the
            recipe's, or "error".
        report: a folder for `report.json`.
        progress: is told of the work.

    Returns:
        What was done.

    Raises:
        RecipeError, UnknownNameError: the recipe.
        CheckpointError: an input is missing or damaged; StatisticsError: statistics, or of another model.
        ArgumentError: an argument, or models that do not fit each other.
        BackendError: the device is not here, or no backend can run there.
        OutputError: `out` cannot be used or written.
        MergeError: the merge cannot go on; finished work stays for `resume`.

    Notes:
        The same bytes for any number of threads and any memory. Inputs are never written.
    """
    began = time.perf_counter()
    _check_device(device, device_memory)
    _check(nonfinite, resume, overwrite)
    _check_progress(progress)
    folder, report_folder = _path(out, "out"), None if report is None else _path(report, "report")
    prepared = _prepare(config, _destination(device), _Limits(memory, device_memory, threads), seed)
    planned, inputs = prepared.plan, prepared.inputs
    nonfinite = nonfinite or prepared.recipe.nonfinite
    identity = prepared.identity()
    if report_folder is not None:
        check_report_folder(report_folder, inputs)
    # Made twice, because they would take memory while tensors are merged: a file that cannot be copied is
    # refused before hours of work.
    companions(prepared.recipe, prepared.binding)
    read_bytes = written_bytes = resumed_bytes = device_peak_bytes = 0
    finished = False
    warnings = planned.warnings
    if dry_run:
        Staging.check(folder, planned.layout, identity, resume=resume, overwrite=overwrite, inputs=inputs)
    else:
        with Staging.open(
            folder, planned.layout, identity, resume=resume, overwrite=overwrite, inputs=inputs
        ) as staging:
            finished = staging.finished
            resumed_bytes = staging.n_resumed_bytes
            if not finished:
                run = Run(
                    planned,
                    staging,
                    prepared.files,
                    propagate=nonfinite == "propagate",
                    progress=progress or Silence(),
                    device=prepared.device,
                )
                outcome = run.execute()
                read_bytes, written_bytes = outcome.read_bytes, outcome.written_bytes
                warnings += outcome.notes
                device_peak_bytes = outcome.device_peak_bytes
                for name, data in companions(prepared.recipe, prepared.binding).items():
                    staging.add_file(name, data)
                staging.commit()
            warnings += tuple(staging.warnings)
    result = Report(
        out=folder,
        dry_run=dry_run,
        n_tensors=len(planned.binding.tasks),
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        resumed_bytes=resumed_bytes,
        finished_before=finished,
        n_passes=planned.n_passes,
        seconds=time.perf_counter() - began,
        peak_bytes=_resident_peak(),
        planned_peak_bytes=planned.peak_bytes,
        device=planned.device.traits.name if planned.device else "cpu",
        device_why=planned.device_why,
        device_peak_bytes=device_peak_bytes,
        planned_device_peak_bytes=planned.device.peak_bytes if planned.device else 0,
        shards=tuple(shard.name for shard in planned.layout.shards),
        warnings=warnings,
    )
    if report_folder is not None:
        Path(report_folder).mkdir(parents=True, exist_ok=True)
        (Path(report_folder) / "report.json").write_text(json.dumps(result.as_json(), indent=2) + "\n")
    return result


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A recipe with the headers of all its files."""

    recipe: Recipe
    checkpoints: dict[str, Checkpoint]
    binding: Binding
    plan: Plan
    seed: int
    device: Device | None

    @property
    def inputs(self) -> list[str]:
        """Directories and files that are read and must not be written to."""
        found = [checkpoint.directory or checkpoint.path for checkpoint in self.checkpoints.values()]
        found += [checkpoint.adapter for checkpoint in self.checkpoints.values() if checkpoint.adapter]
        found += self.binding.statistics
        return found if self.binding.tokenizer is None else [*found, self.binding.tokenizer]

    @property
    def files(self) -> dict[str, FileState]:
        """Every file that tensors are read from, as it was when its header was."""
        headers = [header for checkpoint in self.checkpoints.values() for header in checkpoint.headers]
        headers += [file.header for file in self.binding.statistics.values()]
        return {header.path: FileState(header.n_bytes, header.mtime_ns) for header in headers}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to continue another.

        Whether NaN may pass is not part of it: a run that met one can go on with permission.
        """
        return {
            "version": tvfast.__version__,
            "recipe": hashlib.sha256(self.recipe.text.encode()).hexdigest(),
            "seed": self.seed,
            "inputs": {
                **{path: checkpoint.identity() for path, checkpoint in self.checkpoints.items()},
                **{path: file.identity() for path, file in self.binding.statistics.items()},
            },
        }


@dataclass(frozen=True, slots=True)
class _Limits:
    """As in `merge_checkpoints`."""

    memory: int | None
    device_memory: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class _Destination:
    """Where a merge is to run; `traits` None: on the host."""

    traits: Traits | None
    why: str
    device: Device | None = None
    optional: bool = False  # the host does where the device's memory is too little


def _destination(device: str) -> _Destination:
    """
    Raises:
        BackendError: the device is not here, or no backend can run there.
    """
    if device in NOMINAL:
        return _Destination(NOMINAL[device], NOMINAL[device].description)
    choice: Choice = choose(device)
    traits = choice.device.traits if choice.device else None
    return _Destination(traits, choice.why, choice.device, optional=device == "auto")


def _prepare(config: Config, to: _Destination, limits: _Limits, seed: int | None) -> _Prepared:
    _check_integer("threads", limits.threads, 0, "0 for all cores, or more")
    if limits.memory is not None:
        _check_integer("memory", limits.memory, 1, "a positive number of bytes")
    if seed is not None:
        _check_integer("seed", seed, -(2**63), "an integer of 64 bits", 2**64)
    recipe = config if isinstance(config, Recipe) else load_recipe(config)
    checkpoints = open_models(recipe)
    binding = bind(recipe, checkpoints, seed=seed)
    layout: Layout = make_layout(
        [tensor for task in binding.tasks for tensor in task.described], recipe.shard_bytes, {}
    )
    planned, device = _planned(binding, layout, to, limits)
    return _Prepared(recipe, checkpoints, binding, planned, recipe.seed if seed is None else seed, device)


def _planned(
    binding: Binding, layout: Layout, to: _Destination, limits: _Limits
) -> tuple[Plan, Device | None]:
    """The plan, and the device that it is for."""

    def planned(traits: Traits | None, why: str) -> Plan:
        return make_plan(
            binding,
            layout,
            memory=limits.memory,
            n_threads=limits.threads,
            device=traits,
            device_memory=limits.device_memory,
            device_why=why,
        )

    try:
        return planned(to.traits, to.why), to.device
    except RecipeError:
        raise
    except ArgumentError as error:
        if to.traits is None or not to.optional:
            raise
        return planned(None, str(error).split(". Pass")[0].removesuffix(".")), None


def _check_device(device: str, device_memory: int | None, also: Iterable[str] = ()) -> None:
    known = isinstance(device, str) and (re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) or device in also)
    if not known:
        names = "".join(f", {name!r}" for name in also)
        raise ArgumentError(
            f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or for example 'cuda:1'{names}."
        )
    if device_memory is not None:
        _check_integer("device_memory", device_memory, 1, "a positive number of bytes")


def _check(nonfinite: str | None, resume: bool, overwrite: bool) -> None:
    if nonfinite not in (None, "error", "propagate"):
        raise ArgumentError(f"nonfinite is {nonfinite!r}; expected 'error' or 'propagate'.")
    if resume and overwrite:
        raise ArgumentError("resume and overwrite exclude each other: continue what is there, or replace it.")


def _check_integer(name: str, value: object, least: int, expected: str, end: int | None = None) -> None:
    """Raise unless `value` is an integer in [least, end)."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (end is not None and isinstance(value, int) and value >= end):
        raise ArgumentError(f"{name} is {value!r}; expected {expected}.")


def _check_progress(progress: object) -> None:
    lacking = [name for name in ("start", "read", "wrote", "finish") if not hasattr(progress, name)]
    if progress is not None and lacking:
        raise ArgumentError(
            f"progress is a {type(progress).__name__} without {', '.join(lacking)}; expected an object with "
            "the methods of tvfast.checkpoints.Progress."
        )


def _path(value: object, name: str) -> str:
    """A directory's name as text."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or "\0" in path:
        raise ArgumentError(f"{name} is {value!r}; expected the path of a directory.")
    return path


def _resident_peak() -> int:
    """Largest resident memory of this process, bytes."""
    try:
        with open("/proc/self/status") as lines:  # getrusage counts what the process was forked from, too
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
