"""Merging checkpoints: what `tvfast merge` and `tvfast plan` call. Imports no torch."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from tvfast._preparing import (
    Config,
    Limits,
    Prepared,
    Setting,
    destination,
    foreseen,
    loaded,
    prepare,
)
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.engine.arguments import check_choices, check_device, check_integer, check_progress, path_of
from tvfast.engine.communicator import Alone, Communicator
from tvfast.engine.companions import companions
from tvfast.engine.device import NOMINAL
from tvfast.engine.joint import RankWork, check_agreement, open_staging, publish
from tvfast.engine.observing import Observer
from tvfast.engine.output import check_report_folder
from tvfast.engine.plan import Plan
from tvfast.engine.progress import Progress, Silence, Unfinished
from tvfast.engine.run import Outcome, Run
from tvfast.engine.stages import Stages
from tvfast.engine.staging import Staging
from tvfast.recipe import Recipe, load_recipe

__all__ = ["Plan", "Progress", "Recipe", "Report", "load_recipe", "merge_checkpoints", "plan"]


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
        ranks: what each of several ranks did; the numbers above are their sums, memory that of this one.
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
    ranks: tuple[RankWork, ...] = ()

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
    ranks: int = 1,
) -> Plan:
    """What a merge would read, write and need; reads headers only.

    Args:
        config: a recipe.
        device: as in `merge_checkpoints`; also "a100", "h100" or "h200", which need not be here.
        device_memory: bound of what is allocated on a GPU, bytes; None: nine tenths of what is free.
        memory: bound of the resident memory, bytes; None: chosen by what the machine has free.
        threads: 0: all cores that the process may use.
        seed: key of random draws; None: the recipe's, or 0.
        ranks: processes that share the work, each on a machine of its own; `Plan.ranks` tells of each.

    Raises:
        RecipeError, UnknownNameError: the recipe.
        CheckpointError: a file is missing or damaged; StatisticsError: statistics, or of another model.
        ArgumentError: `memory` or `device_memory` is too little; the least is named. Models do not fit each
            other.
        BackendError: the device is not here, or no backend can run there.
    """
    check_device(device, device_memory, NOMINAL)
    check_integer("ranks", ranks, 1, "at least one")
    setting = Setting(destination(device), Limits(memory, device_memory, threads), seed)
    with Stages("out") as stages:
        return foreseen(loaded(config), setting, stages, ranks).plan


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
    distributed: bool = False,
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
        report: a folder for `report.json`, and for what the merge did to every tensor: `report.html`, a page
            of its own, and `tensors.json`. Drift, kept shares and sign agreement are of a sample; with
            several ranks, of the share of rank 0.
        progress: is told of the work; with several ranks, that of rank 0 of everybody's.
        distributed: every process of a `torchrun` calls this with the same arguments, and does a share of the
            work; `out` and the inputs are on directories that all of them see. Imports torch. Does not change
            the result.

    Returns:
        What was done.

    Raises:
        RecipeError, UnknownNameError: the recipe.
        CheckpointError: an input is missing or damaged; StatisticsError: statistics, or of another model.
        ArgumentError: an argument, or models that do not fit each other.
        BackendError: the device is not here, or no backend can run there.
        OutputError: `out` cannot be used or written.
        MergeError: the merge cannot go on; finished work stays for `resume`.
        RankError: another rank failed, is lost, or was asked for another merge.

    Notes:
        The same bytes for any number of threads and any memory. Inputs are never written.
    """
    check_device(device, device_memory)
    check_choices(nonfinite, resume, overwrite)
    check_progress(progress)
    with _joined(distributed) as ranks:
        job = _Job(
            out=path_of(out, "out"),
            setting=Setting(
                destination(device, ranks if ranks.size > 1 else None),
                Limits(memory, device_memory, threads),
                seed,
                ranks,
            ),
            resume=resume,
            overwrite=overwrite,
            nonfinite=nonfinite,
            progress=progress or Silence(),
            observer=None if report is None or ranks.rank else Observer(),
        )
        return _merge(
            loaded(config), job, None if report is None else path_of(report, "report"), dry_run=dry_run
        )


def _joined(distributed: bool) -> AbstractContextManager[Communicator]:
    """The ranks of this merge."""
    if not distributed:
        return nullcontext(Alone())
    from tvfast.distributed import join

    return join()


@dataclass(frozen=True, slots=True)
class _Job:
    """As in `merge_checkpoints`."""

    out: str
    setting: Setting
    resume: bool
    overwrite: bool
    nonfinite: str | None
    progress: Progress
    observer: Observer | None

    @property
    def ranks(self) -> Communicator:
        return self.setting.ranks

    def agreed(self, prepared: Prepared, dry_run: bool) -> dict[str, Any]:
        """What every rank must have been asked for."""
        options = {"overwrite": self.overwrite, "resume": self.resume, "dry_run": dry_run}
        nonfinite = self.nonfinite or prepared.recipe.nonfinite
        return {**prepared.identity(), **options, "out": os.path.realpath(self.out), "nonfinite": nonfinite}


def _merge(recipe: Recipe, job: _Job, report_folder: str | None, *, dry_run: bool) -> Report:
    """Everything after the arguments are checked."""
    began = time.perf_counter()
    with Stages(job.out) as stages:
        prepared = foreseen(recipe, job.setting, stages)
        check_agreement(job.ranks, job.agreed(prepared, dry_run))
        if report_folder is not None:
            check_report_folder(report_folder, prepared.inputs)
        # Made twice, because they would take memory while tensors are merged: a file that cannot be copied is
        # refused before hours of work.
        companions(recipe, prepared.binding)
        if dry_run and job.ranks.rank:
            done = _Done()
        elif dry_run:
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
        ranks=done.ranks,
    )
    if report_folder is not None and not job.ranks.rank:
        from tvfast.inspection.merge_report import Merged, write_report

        merged = Merged(recipe.text, planned.binding.tasks, result.as_json())
        write_report(report_folder, merged, None if dry_run else job.observer)
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
    ranks: tuple[RankWork, ...] = ()


def _merge_prepared(prepared: Prepared, job: _Job, stages: Stages | None = None) -> _Done:
    """Merge into a staging area and publish what is there."""
    done = _Done()
    ranks = job.ranks
    with open_staging(
        ranks,
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
            outcome, done.ranks = _run(prepared.rest(staging), job, staging)
            done.read_bytes += outcome.read_bytes
            done.written_bytes += outcome.written_bytes
            done.warnings += outcome.notes
            done.device_peak_bytes = max(done.device_peak_bytes, outcome.device_peak_bytes)
        if stages is not None and prepared.recipe.stages and not ranks.rank:
            stages.clear()
        done.warnings += tuple(staging.warnings)
    return done


def _run(prepared: Prepared, job: _Job, staging: Staging) -> tuple[Outcome, tuple[RankWork, ...]]:
    """Merge this rank's share, and publish the whole when all are there."""
    run = Run(
        prepared.plan,
        staging,
        prepared.files,
        propagate=(job.nonfinite or prepared.recipe.nonfinite) == "propagate",
        progress=job.ranks.progress(job.progress),
        device=prepared.device,
        observer=job.observer,
    )
    solves = any(part.task.tensor for unit in prepared.plan.units for part in unit.parts)
    with job.ranks.watching(run.stop, steady=not solves):
        outcome = run.execute()
    return publish(job.ranks, staging, outcome, lambda: companions(prepared.recipe, prepared.binding))


def _with_stages(recipe: Recipe, job: _Job, stages: Stages, done: _Done) -> Prepared:
    """Merge every earlier stage beside the output, where they stay until that is done; the last one on them.

    A stage that an earlier run has finished is verified and taken.
    """
    if not job.resume and not job.ranks.rank:
        stages.clear()
    real: dict[str, Checkpoint] = {}
    for stage in recipe.stages:
        assert stage.name is not None
        folder = stages.folder_of(stage.name)
        own = replace(job, out=folder, resume=True, overwrite=False)
        own = replace(own, progress=Unfinished(job.progress), observer=None)
        prepared = prepare(stage, job.setting, real, stages.identities)
        made = _merge_prepared(prepared, own)
        done.read_bytes += made.read_bytes
        done.written_bytes += made.written_bytes
        done.device_peak_bytes = max(done.device_peak_bytes, made.device_peak_bytes)
        done.warnings += (*prepared.plan.warnings, *made.warnings)
        real[stage.name] = open_checkpoint(folder)
    return prepare(recipe, job.setting, real, stages.identities)


def _resident_peak() -> int:
    """Largest resident memory of this process, bytes."""
    try:
        with open("/proc/self/status") as lines:  # getrusage counts what the process was forked from, too
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
