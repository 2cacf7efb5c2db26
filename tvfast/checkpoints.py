"""Merging checkpoints: what `tvfast merge` and `tvfast plan` call. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tvfast
from tvfast.checkpoint.layout import Layout, make_layout
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.engine.arguments import check_choices, check_device, check_integer, check_progress, path_of
from tvfast.engine.binding import Binding, bind
from tvfast.engine.companions import companions
from tvfast.engine.device import NOMINAL, Choice, Device, Traits, choose
from tvfast.engine.inputs import FileState
from tvfast.engine.opening import open_models
from tvfast.engine.output import check_report_folder
from tvfast.engine.plan import Plan, make_plan
from tvfast.engine.run import Progress, Run, Silence, Unfinished
from tvfast.engine.stages import Stages
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
    check_device(device, device_memory, NOMINAL)
    limits = _Limits(memory, device_memory, threads)
    with Stages("out") as stages:
        return _foreseen(_loaded(config), _destination(device), limits, seed, stages).plan


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
    check_device(device, device_memory)
    check_choices(nonfinite, resume, overwrite)
    check_progress(progress)
    job = _Job(
        out=path_of(out, "out"),
        to=_destination(device),
        limits=_Limits(memory, device_memory, threads),
        resume=resume,
        overwrite=overwrite,
        seed=seed,
        nonfinite=nonfinite,
        progress=progress or Silence(),
    )
    return _merge(
        _loaded(config), job, None if report is None else path_of(report, "report"), dry_run=dry_run
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """As in `merge_checkpoints`."""

    out: str
    to: _Destination
    limits: _Limits
    resume: bool
    overwrite: bool
    seed: int | None
    nonfinite: str | None
    progress: Progress


def _merge(recipe: Recipe, job: _Job, report_folder: str | None, *, dry_run: bool) -> Report:
    """Everything after the arguments are checked."""
    began = time.perf_counter()
    with Stages(job.out) as stages:
        prepared = _foreseen(recipe, job.to, job.limits, job.seed, stages)
        if report_folder is not None:
            check_report_folder(report_folder, prepared.inputs)
        # Made twice, because they would take memory while tensors are merged: a file that cannot be copied is
        # refused before hours of work.
        companions(recipe, prepared.binding)
        if dry_run:
            Staging.check(
                job.out,
                prepared.plan.layout,
                prepared.identity(),
                resume=job.resume,
                overwrite=job.overwrite,
                inputs=prepared.inputs,
            )
            done = _Done()
        else:
            done = _merge_prepared(prepared, job, stages)
    planned = prepared.plan
    result = Report(
        out=job.out,
        dry_run=dry_run,
        n_tensors=len(planned.binding.tasks),
        read_bytes=done.read_bytes,
        written_bytes=done.written_bytes,
        resumed_bytes=done.resumed_bytes,
        finished_before=done.finished_before,
        n_passes=planned.n_passes,
        seconds=time.perf_counter() - began,
        peak_bytes=_resident_peak(),
        planned_peak_bytes=max(one.peak_bytes for one in (planned, *(plan for _, plan in planned.stages))),
        device=planned.device.traits.name if planned.device else "cpu",
        device_why=planned.device_why,
        device_peak_bytes=done.device_peak_bytes,
        planned_device_peak_bytes=planned.device.peak_bytes if planned.device else 0,
        shards=tuple(shard.name for shard in planned.layout.shards),
        warnings=(*planned.warnings, *done.warnings),
    )
    if report_folder is not None:
        Path(report_folder).mkdir(parents=True, exist_ok=True)
        (Path(report_folder) / "report.json").write_text(json.dumps(result.as_json(), indent=2) + "\n")
    return result


@dataclass(slots=True)
class _Done:
    """What was done, stages included."""

    read_bytes: int = 0
    written_bytes: int = 0
    resumed_bytes: int = 0
    finished_before: bool = False
    device_peak_bytes: int = 0
    warnings: tuple[str, ...] = ()


def _merge_prepared(prepared: _Prepared, job: _Job, stages: Stages | None = None) -> _Done:
    """Merge into a staging area and publish what is there."""
    done = _Done()
    with Staging.open(
        job.out,
        prepared.plan.layout,
        prepared.identity(),
        resume=job.resume,
        overwrite=job.overwrite,
        inputs=prepared.inputs,
    ) as staging:
        done.finished_before = staging.finished
        done.resumed_bytes = staging.n_resumed_bytes
        if not staging.finished:
            if stages is not None and prepared.recipe.stages:
                prepared = _with_stages(prepared.recipe, job, stages, done)
            run = Run(
                prepared.plan,
                staging,
                prepared.files,
                propagate=(job.nonfinite or prepared.recipe.nonfinite) == "propagate",
                progress=job.progress,
                device=prepared.device,
            )
            outcome = run.execute()
            done.read_bytes += outcome.read_bytes
            done.written_bytes += outcome.written_bytes
            done.warnings += outcome.notes
            done.device_peak_bytes = max(done.device_peak_bytes, outcome.device_peak_bytes)
            for name, data in companions(prepared.recipe, prepared.binding).items():
                staging.add_file(name, data)
            staging.commit()
        if stages is not None and prepared.recipe.stages:
            stages.clear()
        done.warnings += tuple(staging.warnings)
    return done


def _with_stages(recipe: Recipe, job: _Job, stages: Stages, done: _Done) -> _Prepared:
    """Merge every earlier stage beside the output, where they stay until that is done; the last one on them.

    A stage that an earlier run has finished is verified and taken.
    """
    if not job.resume:
        stages.clear()
    real: dict[str, Checkpoint] = {}
    for stage in recipe.stages:
        assert stage.name is not None
        folder = stages.folder_of(stage.name)
        own = replace(job, out=folder, resume=True, overwrite=False, progress=Unfinished(job.progress))
        prepared = _prepare(stage, job.to, job.limits, job.seed, real, stages.identities)
        made = _merge_prepared(prepared, own)
        done.read_bytes += made.read_bytes
        done.written_bytes += made.written_bytes
        done.device_peak_bytes = max(done.device_peak_bytes, made.device_peak_bytes)
        done.warnings += (*prepared.plan.warnings, *made.warnings)
        real[stage.name] = open_checkpoint(folder)
    return _prepare(recipe, job.to, job.limits, job.seed, real, stages.identities)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A recipe with the headers of all its files; `identities` are those of models that stages make."""

    recipe: Recipe
    checkpoints: dict[str, Checkpoint]
    binding: Binding
    plan: Plan
    seed: int
    device: Device | None
    identities: Mapping[str, list[dict[str, Any]]]

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
            **({"vocabulary": list(self.binding.vocabulary)} if self.binding.vocabulary else {}),
            "inputs": {
                **{model: self._identity_of(model) for model in self.checkpoints},
                **{path: file.identity() for path, file in self.binding.statistics.items()},
            },
        }

    def _identity_of(self, model: str) -> list[dict[str, Any]]:
        """Of a stage's result, what it is made of, and its adapter."""
        checkpoint = self.checkpoints[model]
        path, adapter = self.recipe.parts_of(model)
        made = self.identities.get(path)
        if made is None:
            return checkpoint.identity()
        return made if adapter is None else made + checkpoint.identity()[len(checkpoint.headers) - 1 :]


@dataclass(frozen=True, slots=True)
class _Limits:
    """As in `merge_checkpoints`."""

    memory: int | None
    device_memory: int | None
    threads: int

    def __post_init__(self) -> None:
        check_integer("threads", self.threads, 0, "0 for all cores, or more")
        if self.memory is not None:
            check_integer("memory", self.memory, 1, "a positive number of bytes")


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


def _loaded(config: Config) -> Recipe:
    return config if isinstance(config, Recipe) else load_recipe(config)


def _foreseen(
    recipe: Recipe, to: _Destination, limits: _Limits, seed: int | None, stages: Stages
) -> _Prepared:
    """A recipe with those that it needs, all of them checked before anything is merged."""
    plans: list[tuple[str, Plan]] = []
    for stage in recipe.stages:
        assert stage.name is not None
        prepared = _prepare(stage, to, limits, seed, stages.foreseen, stages.identities)
        stages.foresee(
            stage.name,
            prepared.binding,
            prepared.plan.layout,
            companions(stage, prepared.binding),
            prepared.identity(),
        )
        plans.append((stage.name, prepared.plan))
    found = _prepare(recipe, to, limits, seed, stages.foreseen, stages.identities)
    return replace(found, plan=replace(found.plan, stages=tuple(plans)))


def _prepare(
    recipe: Recipe,
    to: _Destination,
    limits: _Limits,
    seed: int | None,
    known: Mapping[str, Checkpoint],
    identities: Mapping[str, list[dict[str, Any]]],
) -> _Prepared:
    """
    Args:
        known: checkpoints of models that are results of stages.
    """
    if seed is not None:
        check_integer("seed", seed, -(2**63), "an integer of 64 bits", 2**64)
    checkpoints = open_models(recipe, known)
    binding = bind(recipe, checkpoints, seed=seed)
    layout: Layout = make_layout(
        [tensor for task in binding.tasks for tensor in task.described], recipe.shard_bytes, {}
    )
    planned, device = _planned(binding, layout, to, limits)
    seed = recipe.seed if seed is None else seed
    return _Prepared(recipe, checkpoints, binding, planned, seed, device, identities)


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


def _resident_peak() -> int:
    """Largest resident memory of this process, bytes."""
    try:
        with open("/proc/self/status") as lines:  # getrusage counts what the process was forked from, too
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
