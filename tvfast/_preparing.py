"""What a merge needs before its first tensor is read: recipe, headers, binding, plan. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import tvfast
from tvfast.checkpoint.layout import Layout, make_layout
from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.arguments import check_integer
from tvfast.engine.binding import Binding, bind
from tvfast.engine.communicator import Alone, Communicator
from tvfast.engine.companions import companions
from tvfast.engine.device import NOMINAL, Choice, Device, Traits, choose
from tvfast.engine.inputs import FileState
from tvfast.engine.joint import share_of
from tvfast.engine.opening import open_models
from tvfast.engine.partition import partition
from tvfast.engine.plan import Plan, Share, Work, make_plan
from tvfast.engine.stages import Stages
from tvfast.engine.staging import Staging
from tvfast.errors import ArgumentError, RecipeError
from tvfast.recipe import Recipe, load_recipe

Config = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe: the path of its YAML file, the mapping that such a file holds, or a loaded one."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe with the headers of all its files; `identities` are those of models that stages make."""

    recipe: Recipe
    checkpoints: dict[str, Checkpoint]
    binding: Binding
    plan: Plan
    seed: int
    device: Device | None
    identities: Mapping[str, list[dict[str, Any]]]
    setting: Setting

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

    def rest(self, staging: Staging) -> Prepared:
        """With the plan of what this rank has to do beside what is finished."""
        share = share_of(self.setting.ranks, self.binding.tasks, self.plan.layout, staging)
        if share is None:
            return self
        plan, device = planned(self.binding, self.plan.layout, self.setting, share)
        return replace(self, plan=plan, device=device)


@dataclass(frozen=True, slots=True)
class Limits:
    """As in `merge_checkpoints`."""

    memory: int | None
    device_memory: int | None
    threads: int

    def __post_init__(self) -> None:
        check_integer("threads", self.threads, 0, "0 for all cores, or more")
        if self.memory is not None:
            check_integer("memory", self.memory, 1, "a positive number of bytes")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a merge is to run; `traits` None: on the host."""

    traits: Traits | None
    why: str
    device: Device | None = None
    optional: bool = False  # the host does where the device's memory is too little


def destination(device: str, ranks: Communicator | None = None) -> Destination:
    """
    Args:
        ranks: each has a GPU of its own where `device` names none.

    Raises:
        BackendError: the device is not here, or no backend can run there.
    """
    if device in NOMINAL:
        return Destination(NOMINAL[device], NOMINAL[device].description)
    choice: Choice = choose(device, ranks.local_rank) if ranks else choose(device)
    traits = choice.device.traits if choice.device else None
    return Destination(traits, choice.why, choice.device, optional=device == "auto")


def loaded(config: Config) -> Recipe:
    return config if isinstance(config, Recipe) else load_recipe(config)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where, with how much and by how many a merge is done; `seed` None: the recipe's."""

    to: Destination
    limits: Limits
    seed: int | None
    ranks: Communicator = field(default_factory=Alone)


def foreseen(recipe: Recipe, setting: Setting, stages: Stages, n_ranks: int = 1) -> Prepared:
    """A recipe with those that it needs, all of them checked before anything is merged.

    Args:
        n_ranks: how many machines the plan is to tell the work of.
    """
    plans: list[tuple[str, Plan]] = []
    works: list[tuple[Work, ...]] = []
    for stage in recipe.stages:
        assert stage.name is not None
        prepared = prepare(stage, setting, stages.foreseen, stages.identities)
        stages.foresee(
            stage.name,
            prepared.binding,
            prepared.plan.layout,
            companions(stage, prepared.binding),
            prepared.identity(),
        )
        plans.append((stage.name, prepared.plan))
        works.append(works_of(prepared, n_ranks))
    found = prepare(recipe, setting, stages.foreseen, stages.identities)
    works.append(works_of(found, n_ranks))
    ranks = tuple(reduce(Work.then, of_rank) for of_rank in zip(*works, strict=True))
    return replace(found, plan=replace(found.plan, stages=tuple(plans), ranks=ranks))


def works_of(prepared: Prepared, n_ranks: int) -> tuple[Work, ...]:
    """What each of several ranks would do, on a machine of its own."""
    if n_ranks == 1:
        return (prepared.plan.work,)
    binding, layout = prepared.binding, prepared.plan.layout
    shares = [Share(parts, per_host=1) for parts in partition(binding.tasks, n_ranks)]
    return tuple(planned(binding, layout, prepared.setting, share)[0].work for share in shares)


def prepare(
    recipe: Recipe,
    setting: Setting,
    known: Mapping[str, Checkpoint],
    identities: Mapping[str, list[dict[str, Any]]],
) -> Prepared:
    """
    Args:
        known: checkpoints of models that are results of stages.
        identities: of those.
    """
    seed = setting.seed
    if seed is not None:
        check_integer("seed", seed, -(2**63), "an integer of 64 bits", 2**64)
    checkpoints = open_models(recipe, known)
    binding = bind(recipe, checkpoints, seed=seed)
    described = [tensor for task in binding.tasks for tensor in task.described]
    if recipe.out_format == "dcp":
        from tvfast.checkpoint.dcp_layout import make_dcp_layout

        layout = make_dcp_layout(described, recipe.shard_bytes)
    else:
        layout = make_layout(described, recipe.shard_bytes, {})
    plan, device = planned(binding, layout, setting, share_of(setting.ranks, binding.tasks, layout))
    seed = recipe.seed if seed is None else seed
    return Prepared(recipe, checkpoints, binding, plan, seed, device, identities, setting)


def planned(
    binding: Binding, layout: Layout, setting: Setting, share: Share | None
) -> tuple[Plan, Device | None]:
    """The plan of a share, and the device that it is for."""
    to, limits = setting.to, setting.limits

    def plan_on(traits: Traits | None, why: str) -> Plan:
        return make_plan(
            binding,
            layout,
            memory=limits.memory,
            n_threads=limits.threads,
            device=traits,
            device_memory=limits.device_memory,
            device_why=why,
            share=share,
        )

    try:
        return plan_on(to.traits, to.why), to.device
    except RecipeError:
        raise
    except ArgumentError as error:
        if to.traits is None or not to.optional:
            raise
        return plan_on(None, str(error).split(". Pass")[0].removesuffix(".")), None
