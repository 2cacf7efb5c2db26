"""TIES over a whole model, task arithmetic, MagMax, SLERP and DARE as FusionBench computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.integrations._chunks import flat_chunks
from tvfast.integrations._fusion_bench_leaves import (
    Leaf,
    check_modules,
    empty_like,
    leaves,
    resident,
    states,
)
from tvfast.integrations._patching import Function, Integration, NotServed
from tvfast.integrations._tables import (
    Merge,
    check_served,
    entry,
    method,
    number,
    random_keys,
    scalars,
)
from tvfast.methods.base import share_groups
from tvfast.methods.scalars import draw_limit, float32
from tvfast.methods.slerp import coefficients
from tvfast.methods.ties import Ties
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.program import Entry, Gain, Keep, Program, Reduce, TensorScalars

# -- TIES -----------------------------------------------------------------------------------------------


def _ties_method(reset_thresh: Any, merge_func: Any, scale: float, like: Tensor, n_elements: int) -> Ties:
    share = number(reset_thresh, "the threshold")
    share = share / 100 if share > 1 else share
    function = str(merge_func).split("-")[-1]
    if function not in ("sum", "mean", "max"):
        raise NotServed("an unknown merge function")
    if not 0.0 <= share < 1.0 or int(n_elements * share) >= n_elements:
        raise NotServed("a threshold that keeps everything")
    if function == "mean" and like.dtype != torch.float32:
        raise NotServed("a mean in 16 bits, which is float32")
    made = method("ties", dialect=f"fusion_bench_{function}", density=share, scale=scale)
    assert isinstance(made, Ties)
    return made


def _elect(made: Ties, entries: Sequence[Entry]) -> tuple[Program, list[TensorScalars]]:
    """Thresholds and the majority sign over all entries together."""
    share_groups(made, entries)
    return made.resolve(Merge(list(entries), []).statistics)


def ties_merging(flat_task_checks: Tensor, reset_thresh: Any = None, merge_func: str = "") -> Tensor:
    """TIES of the rows [K, d] of one tensor."""
    check_served([flat_task_checks])
    if flat_task_checks.dim() != 2:
        raise NotServed("task vectors that are no matrix")
    rows = list(flat_task_checks.detach())
    made = _ties_method(reset_thresh, merge_func, 1.0, rows[0], rows[0].numel())
    out = on_huge_pages(torch.empty_like(rows[0]))
    one = entry(rows, out, name="tensor")
    program, numbers = _elect(made, [one])
    Merge([one], numbers).combine(program, finite=True)
    if program.reduce is Reduce.MAX_ABS and numbers[0].majority < 0.0:
        negative_zeros_(out)
    return out


@torch.no_grad()
def run_ties(me: Any, modelpool: Any, **kwargs: Any) -> nn.Module:
    """`TiesMergingAlgorithm.run`: into the pretrained model's own tensors."""
    from fusion_bench.compat.modelpool import to_modelpool

    pool = to_modelpool(modelpool)
    with me.profile("loading models"):
        pretrained = pool.load_model("_pretrained_")
        models = [pool.load_model(name) for name in pool.model_names]
    check_modules(pretrained, *models)
    base, *others = states(pretrained, *models)
    if any(key in base for key in me.config.get("remove_keys", [])):
        raise NotServed("keys that are left out")
    with me.profile("merging models"):
        found = leaves(base, others)
        n_elements = sum(leaf.base.numel() for leaf in found)
        function = me.config.get("merge_func", "sum")
        scale = number(me.scaling_factor, "the scaling factor")
        made = _ties_method(me.threshold, function, scale, found[0].base, n_elements)
        if len({leaf.base.dtype for leaf in found}) > 1:
            raise NotServed("several dtypes")
        entries = [_in_place(leaf) for leaf in found]
        Merge(entries, []).check_finite()
        program, numbers = _elect(made, entries)
        adds_negative_zeros = function == "max" and numbers[0].majority < 0.0
        if adds_negative_zeros and any(_has_negative_zero(leaf.base) for leaf in found):
            raise NotServed("a base with -0, to which -0 is added")
        once = [(e, s) for e, s, leaf in zip(entries, numbers, found, strict=True) if not leaf.repeated]
        Merge([e for e, _ in once], [s for _, s in once]).combine(program)
    me.print_profile_summary()
    return pretrained  # type: ignore[no-any-return]


def _in_place(leaf: Leaf) -> Entry:
    return entry(leaf.models, leaf.base, base=leaf.base, name=leaf.name)


def _has_negative_zero(tensor: Tensor) -> bool:
    flat = tensor.detach().view(-1)
    return any(bool(((flat[p] == 0) & flat[p].signbit()).any()) for p in flat_chunks(flat.numel()))


def negative_zeros_(tensor: Tensor) -> None:
    """Make every zero -0, as zeros times a negative sign are."""
    flat = tensor.view(-1)
    for part in flat_chunks(flat.numel()):
        flat[part].masked_fill_(flat[part] == 0, -0.0)


# -- sums and the largest -------------------------------------------------------------------------------


def _merge_models(
    program: Program, pretrained: nn.Module, models: Sequence[nn.Module], scale: float, *, finite: bool
) -> None:
    """Into the pretrained model: base + scale * what the program makes of the task vectors."""
    check_modules(pretrained, *models)
    base, *others = states(pretrained, *models)
    found = [leaf for leaf in leaves(base, others) if not leaf.repeated]
    merge = Merge([_in_place(leaf) for leaf in found], [])
    if finite:
        merge.check_finite()
    merge.numbers = [scalars((1.0,) * len(models), scale=scale) for _ in found]
    merge.combine(program)


_SUM = Program()
_LARGEST = Program(reduce=Reduce.MAX_ABS)


@torch.no_grad()
def task_arithmetic_merge(
    pretrained_model: nn.Module,
    finetuned_models: list[nn.Module],
    scaling_factor: float,
    inplace: bool = True,
) -> nn.Module:
    """θ₀ + λ Σ_k τ_k."""
    check_modules(pretrained_model)
    target = pretrained_model if inplace else deepcopy(pretrained_model)
    scale = number(scaling_factor, "the scaling factor")
    _merge_models(_SUM, target, finetuned_models, scale, finite=False)
    return target


@torch.no_grad()
def run_task_arithmetic(me: Any, modelpool: Any) -> nn.Module:
    """`TaskArithmeticAlgorithm.run` of models that are in memory."""
    return _run(me, modelpool, _SUM, finite=False)


@torch.no_grad()
def magmax_merge(
    pretrained_model: nn.Module,
    finetuned_models: list[nn.Module],
    scaling_factor: float = 1.0,
    inplace: bool = True,
) -> nn.Module:
    """θ₀ + λ · the task vector's entry of largest magnitude; the later of equals."""
    check_modules(pretrained_model)
    target = pretrained_model if inplace else deepcopy(pretrained_model)
    scale = number(scaling_factor, "the scaling factor")
    _merge_models(_LARGEST, target, finetuned_models, scale, finite=True)
    return target


@torch.no_grad()
def run_magmax(me: Any, modelpool: Any) -> nn.Module:
    """`MagMaxAlgorithm.run` of models that are in memory."""
    return _run(me, modelpool, _LARGEST, finite=True)


def _run(me: Any, modelpool: Any, program: Program, *, finite: bool) -> nn.Module:
    pretrained, models = resident(modelpool)
    target = pretrained if me.inplace else deepcopy(pretrained)
    with me.profile("merge weights"):
        _merge_models(program, target, models, number(me.scaling_factor, "the scaling factor"), finite=finite)
    me.print_profile_summary()
    return target


@torch.no_grad()
def magmax_select(task_vectors: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """New tensors with each entry of largest magnitude."""
    if not task_vectors:
        raise NotServed("no task vectors")
    found = leaves(task_vectors[0], task_vectors)
    outs = {leaf.name: empty_like(leaf.models) for leaf in found}
    merge = Merge([entry(leaf.models, outs[leaf.name], name=leaf.name) for leaf in found], [])
    merge.numbers = [scalars((1.0,) * len(task_vectors)) for _ in found]
    merge.combine(_LARGEST, finite=True)
    return outs


# -- SLERP ----------------------------------------------------------------------------------------------


def slerp(t: float, v0: Tensor, v1: Tensor, DOT_THRESHOLD: float = 0.9995, epsilon: float = 1e-8) -> Tensor:
    """On the arc between two tensors, or on the line where they are nearly parallel; float32."""
    if (DOT_THRESHOLD, epsilon) != (0.9995, 1e-8):
        raise NotServed("thresholds of the caller's")
    check_served([v0, v1])
    share = number(t, "t")
    out = on_huge_pages(torch.empty(v0.shape, dtype=torch.float32, device=v0.device))
    merge = Merge([entry((v0, v1), out)], [scalars((1.0, 1.0))])
    first, second = slerp_weights(merge.statistics.gram(Program(), merge.numbers)[0], share)
    for model, weight in zip(merge.numbers[0].models, (first, second), strict=True):
        model.weight = number(weight, "a coefficient")
    merge.combine(Program())
    return out


def slerp_weights(gram: list[list[float]], t: float) -> tuple[float, float]:
    """As `tvfast.methods.slerp`, with 1 - t in float64, as a Python number has it."""
    found = coefficients(gram, t)
    on_the_line = found == coefficients([[1.0, 1.0], [1.0, 1.0]], t)
    return (float32(1.0 - t), float32(t)) if on_the_line else found


# -- DARE -----------------------------------------------------------------------------------------------


def drop(integration: Integration) -> Function:
    """`param_random_drop_`."""

    @torch.no_grad()
    def param_random_drop_(param: Tensor, sparsity_level: float, rescale: bool) -> None:
        if integration.rng == "peer":
            raise NotServed("FusionBench's own draws")
        data = param.data
        check_served([data])
        sparsity = number(sparsity_level, "the sparsity")
        if not 0.0 <= sparsity < 1.0:
            raise NotServed("everything is dropped")
        out = on_huge_pages(torch.empty_like(data))
        merge = Merge([entry([data], out)], [scalars((1.0,))])
        merge.check_finite()
        model = merge.numbers[0].models[0]
        (model.key,) = random_keys("fusion_bench", 1)
        model.limit, model.prob = draw_limit(1.0 - sparsity), float32(1.0 - sparsity)
        merge.combine(Program(keep=Keep.RANDOM, gain=Gain.INVERSE_PROBABILITY if rescale else Gain.MODEL))
        param.data = out

    return param_random_drop_
