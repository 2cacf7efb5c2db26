"""Merging checkpoints: what `tvfast merge` and `tvfast plan` call. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvfast
from tvfast.checkpoint.layout import Layout, make_layout
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.engine.binding import Binding, bind
from tvfast.engine.companions import companions
from tvfast.engine.inputs import FileState
from tvfast.engine.output import check_report_folder
from tvfast.engine.plan import Plan, make_plan
from tvfast.engine.run import Progress, Run, Silence
from tvfast.engine.staging import Staging
from tvfast.errors import ArgumentError, BackendError
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
    shards: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(config: Config, *, memory: int | None = None, threads: int = 0, seed: int | None = None) -> Plan:
    """What a merge would read, write and need; reads headers only.

    Args:
        config: a recipe.
        memory: bound of the resident memory, bytes; None: chosen by what the machine has free.
        threads: 0: all cores that the process may use.
        seed: key of random draws; None: the recipe's, or 0.

    Raises:
        RecipeError, UnknownNameError: the recipe.
        CheckpointError: a file is missing or damaged; StatisticsError: statistics, or of another model.
        ArgumentError: `memory` is too little; the least is named. Models do not fit each other.
    """
    return _prepare(config, memory=memory, threads=threads, seed=seed).plan


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
        device: "auto" or "cpu".
        threads: 0: all cores that the process may use. Does not change the result.
        memory: bound of the resident memory of the process, bytes; None: what keeps disk and cores busy. Does
            not change the result.
        device_memory: bound of the memory taken on a GPU.
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
        OutputError: `out` cannot be used or written.
        MergeError: the merge cannot go on; finished work stays for `resume`.

    Notes:
        The same bytes for any number of threads and any memory. Inputs are never written.
    """
    began = time.perf_counter()
    _check(device, device_memory, nonfinite, resume, overwrite)
    _check_progress(progress)
    folder, report_folder = _path(out, "out"), None if report is None else _path(report, "report")
    prepared = _prepare(config, memory=memory, threads=threads, seed=seed)
    planned, inputs = prepared.plan, prepared.inputs
    nonfinite = nonfinite or prepared.recipe.nonfinite
    identity = prepared.identity()
    if report_folder is not None:
        check_report_folder(report_folder, inputs)
    # Made twice, because they would take memory while tensors are merged: a file that cannot be copied is
    # refused before hours of work.
    companions(prepared.recipe, prepared.binding)
    read_bytes = written_bytes = resumed_bytes = 0
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
                )
                outcome = run.execute()
                read_bytes, written_bytes = outcome.read_bytes, outcome.written_bytes
                warnings += outcome.notes
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

    @property
    def inputs(self) -> list[str]:
        """Directories and files that are read and must not be written to."""
        found = [checkpoint.directory or checkpoint.path for checkpoint in self.checkpoints.values()]
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


def _prepare(config: Config, *, memory: int | None, threads: int, seed: int | None) -> _Prepared:
    _check_integer("threads", threads, 0, "0 for all cores, or more")
    if memory is not None:
        _check_integer("memory", memory, 1, "a positive number of bytes")
    if seed is not None:
        _check_integer("seed", seed, -(2**63), "an integer of 64 bits", 2**64)
    recipe = config if isinstance(config, Recipe) else load_recipe(config)
    checkpoints = {path: open_checkpoint(path) for path in recipe.model_paths()}
    binding = bind(recipe, checkpoints, seed=seed)
    layout: Layout = make_layout(
        [(task.name, task.dtype, task.shape) for task in binding.tasks], recipe.shard_bytes, {}
    )
    planned = make_plan(binding, layout, memory=memory, n_threads=threads)
    return _Prepared(recipe, checkpoints, binding, planned, recipe.seed if seed is None else seed)


def _check(
    device: str, device_memory: int | None, nonfinite: str | None, resume: bool, overwrite: bool
) -> None:
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ArgumentError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or for example 'cuda:1'.")
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"device {device!r}: this build merges checkpoints on the CPU only; expected 'auto' or 'cpu'."
        )
    if device_memory is not None:
        _check_integer("device_memory", device_memory, 1, "a positive number of bytes")
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
