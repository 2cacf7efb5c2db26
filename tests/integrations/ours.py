"""Our functions in the form that `cases` calls: without the peers, which are no dependency."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from tvfast.integrations import _fusion_bench_arithmetic as arithmetic
from tvfast.integrations import _fusion_bench_masks as masks
from tvfast.integrations import _fusion_bench_models as models
from tvfast.integrations import _fusion_bench_statistics as statistics
from tvfast.integrations import _mergekit_0_1_5 as mergekit
from tvfast.integrations import mergekit as mergekit_module
from tvfast.integrations import peft, sd_mecha
from tvfast.integrations._mergekit import karcher, sparsify

_STAGES = {
    "task_arithmetic": (None, None, False, False),
    "ties": ("magnitude", "sum", True, False),
    "breadcrumbs": ("magnitude_outliers", None, False, False),
    "breadcrumbs_ties": ("magnitude_outliers", "sum", False, False),
}
_DEFAULTS: dict[str, Any] = {"lambda": 1.0, "density": 1.0, "gamma": 0.01}


class PerInput:
    """mergekit's values by input, as far as they are read."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def values_for(self, entries: Any) -> list[float]:
        return self.values


def group(base: Tensor | None, tensors: list[Tensor]) -> Any:
    """mergekit's group of tensors, as far as it is read."""
    entries = [SimpleNamespace(tensor=tensor, id=index) for index, tensor in enumerate(tensors)]
    return SimpleNamespace(base=SimpleNamespace(tensor=base), non_base=entries)


def _task_vectors(name: str, base: Tensor, tensors: list[Tensor], own: dict[str, Any]) -> Tensor:
    sparsifier, consensus, normalize, rescale = _STAGES[name]
    given: dict[str, Any] = {**_DEFAULTS, "normalize": normalize, "rescale": rescale, **own}
    if not name.startswith("breadcrumbs"):
        del given["gamma"]
    for key in given.keys() & {"weight", "density", "gamma"}:
        values = given[key] if isinstance(given[key], list) else [given[key]] * len(tensors)
        given[key] = PerInput(values)
    method = SimpleNamespace(sparsification_method=sparsifier, consensus_method=consensus)
    merged: Tensor = mergekit._merge_group(mergekit_module.INTEGRATION)(method, group(base, tensors), **given)
    return merged


def _spherical(name: str, base: Tensor | None, tensors: list[Tensor], weights: list[float]) -> Tensor:
    function = mergekit._nuslerp if name == "nuslerp" else mergekit._multislerp
    found = (
        group(base, tensors)
        if base is not None
        else SimpleNamespace(base=None, non_base=group(None, tensors).non_base)
    )
    return function(found, PerInput(weights))


def _sparsify(tensor: Tensor, density: float, kind: str, norm: str | None, own: dict[str, Any]) -> Tensor:
    made: Tensor = sparsify(mergekit_module.INTEGRATION)(tensor, density, kind, rescale_norm=norm, **own)
    return made


def _slerp(t: float, a: Tensor, b: Tensor) -> Tensor:
    import torch

    return mergekit._slerp(torch.tensor([t]), a.unsqueeze(0), b.unsqueeze(0))[0]


class _Algorithm:
    """A FusionBench algorithm, as far as ours reads it."""

    inplace = True

    def __init__(self, scaling_factor: float, threshold: float = 0.0, merge_func: str = "") -> None:
        self.scaling_factor, self.threshold = scaling_factor, threshold
        self.config = {"remove_keys": [], "merge_func": merge_func}

    def profile(self, _name: str) -> Any:
        return contextlib.nullcontext()

    def print_profile_summary(self) -> None:
        pass


def _run_ties(base: Any, others: list[Any], scale: float, percent: float, how: str) -> Any:
    return models.run_ties(_Algorithm(scale, percent, how), [base, *others])


def _pool(found: list[Any]) -> dict[str, Any]:
    return {"_pretrained_": found[0]} | {str(k): model for k, model in enumerate(found[1:])}


def fusion_bench_pool(found: list[Any]) -> Any:
    """What stands for `to_modelpool`: the first model is the pretrained one."""
    own = _pool(found)
    names = [name for name in own if name != "_pretrained_"]
    return SimpleNamespace(load_model=own.__getitem__, model_names=names)


OURS: dict[str, Any] = {
    "peft": peft,
    "sd_mecha": sd_mecha,
    "mergekit": SimpleNamespace(
        spherical=_spherical,
        karcher=lambda tensors: karcher(tensors, [1.0 / len(tensors)] * len(tensors)),
        task_vectors=_task_vectors,
        sparsify=_sparsify,
        slerp=_slerp,
        sce=lambda base, tensors, share: mergekit._sce(group(base, tensors), select_topk=share),
        model_stock=lambda base, tensors: mergekit._model_stock(group(base, tensors)),
    ),
    "fusion_bench": SimpleNamespace(
        ties_merging=models.ties_merging,
        run_ties=_run_ties,
        run_task_arithmetic=lambda base, others, scale: models.run_task_arithmetic(
            _Algorithm(scale), _pool([base, *others])
        ),
        run_magmax=lambda base, others, scale: models.run_magmax(_Algorithm(scale), _pool([base, *others])),
        magmax_merge=models.magmax_merge,
        magmax_select=models.magmax_select,
        slerp=models.slerp,
        fisher=statistics.merging_with_fisher_weights,
        regmean=statistics.merging_with_regmean_weights,
        emr_merge=masks.emr_merge,
        flat_task_masks=masks.flat_task_masks,
        task_masks=masks.task_masks,
        **{name: make(lambda rest: rest) for name, make in arithmetic.MAKERS.items()},
    ),
}
