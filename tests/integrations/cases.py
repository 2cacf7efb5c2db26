"""Calls of the peers' functions on made inputs: for golden files, live comparisons and our own tests.

Imported by a peer's interpreter too, so it needs numpy and torch only.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: its key.
        call: from an API, the peer's or ours, to what is compared.
        ulps: how far float32 results may be `apart`; 0 means equal bits.
        ulps_elsewhere: the same of results from another kind of processor, whose linear algebra library sums
            in another order; None: `ulps`.
        seeded: draws that the peer's generator makes, from a seed.
        hook: what `stats()` must count; None: the call is one that is left to the peer.
    """

    name: str
    call: Callable[[Any], Results]
    hook: str | None
    ulps: int = 0
    seeded: bool = False
    versions: tuple[str, ...] = ()
    ulps_elsewhere: int | None = None


def tensors(seed: int, shape: tuple[int, ...], count: int, scale: float = 1.0) -> list[Tensor]:
    """Normal values with some exact zeros, of both signs; magnitudes that hardly ever tie."""
    rng = np.random.default_rng([seed, count, *shape])
    made = []
    for _ in range(count):
        values = rng.standard_normal(shape) * scale
        values[rng.random(shape) < 0.02] = 0.0
        values[rng.random(shape) < 0.02] = -0.0
        made.append(torch.from_numpy(values.astype(np.float32)))
    return made


def family(seed: int, shape: tuple[int, ...], count: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it."""
    base, *deltas = tensors(seed, shape, count + 1)
    return base, [base + 0.1 * delta for delta in deltas]


def out(result: Tensor) -> Results:
    return {"out": result}


def ulps(found: Tensor, wanted: Tensor) -> int:
    """Steps between float32 numbers, +0 and -0 being one apart; at most 2**32."""
    a, b = (tensor.contiguous().view(torch.int32).to(torch.int64) for tensor in (found, wanted))
    a, b = (torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) for bits in (a, b))
    return int((a - b).abs().max()) if a.numel() else 0


def apart(found: Tensor, wanted: Tensor, allowed: int) -> float:
    """How far results are apart: in steps where equal bits are asked for.

    Otherwise in units of 2^-23 of the largest entry. A coefficient that is an ulp off moves every term by so
    much; where terms cancel, what is left of the entry is smaller, and so are its steps.
    """
    if allowed == 0:
        return float(ulps(found, wanted))
    largest = float(wanted.abs().max())
    difference = float((found.double() - wanted.double()).abs().max())
    return difference / (largest * 2.0**-23) if largest > 0.0 else difference


SHAPES = ((263,), (19, 23), (3, 8, 5))
WEIGHTS = (0.5, -0.3, 0.2, 1.25)


# -- peft -----------------------------------------------------------------------------------------------


def peft_cases() -> Iterator[Case]:
    for count in (1, 2, 3, 4):
        for shape in SHAPES:
            deltas = tensors(1, shape, count)
            for label, values in (("mixed", WEIGHTS), ("whole", (0.0, -1.0, 2.0, 1.0))):
                weights = torch.tensor(values[:count])
                yield from _peft(f"{count}-{'x'.join(map(str, shape))}-{label}", deltas, weights)


def _peft(label: str, deltas: list[Tensor], weights: Tensor) -> Iterator[Case]:
    def case(function: str, hook: str | None = "", *arguments: Any, seeded: bool = False) -> Case:
        key = "-".join([function, label, *map(str, arguments)])
        call = lambda api: out(getattr(api, function)(deltas, weights, *arguments))  # noqa: E731
        return Case(key, call, function if hook == "" else hook, seeded=seeded)

    yield case("task_arithmetic")
    for density in (0.29, 0.8, 1.0):
        yield case("magnitude_prune", "", density)
        yield case("dare_linear", "", density, seeded=True)
        for vote in ("total", "frequency"):
            yield case("ties", "", density, vote)
            yield case("dare_ties", "", density, vote, seeded=True)
    yield case("dare_linear", None, 0.0, seeded=True)
    yield case("ties", None, 0.0)


def peft_api() -> Any:
    return importlib.import_module("peft.utils.merge_utils")


# -- mergekit -------------------------------------------------------------------------------------------

_TASK_VECTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "task_arithmetic": ({}, {"normalize": True}),
    "ties": ({"density": 0.29}, {"density": 1.0}, {"density": 0.4, "lambda": 0.7, "rescale": True}),
    "breadcrumbs": ({"density": 0.8, "gamma": 0.05}, {"density": 0.99, "gamma": 0.1}),
    "breadcrumbs_ties": ({"density": 0.5, "gamma": 0.05, "normalize": True},),
}
_RANDOM: dict[str, dict[str, Any]] = {
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
}


def mergekit_cases() -> Iterator[Case]:
    for count in (1, 2, 3, 4):
        for shape in SHAPES:
            base, models = family(2, shape, count)
            label = f"{count}-{'x'.join(map(str, shape))}"
            weights = [0.5, -0.3, 0.2, 1.25][:count]
            for name, choices in _TASK_VECTORS.items():
                for number, own in enumerate(choices):
                    call = _task_vectors(name, base, models, {"weight": weights, **own})
                    # an L1 gain is a ratio of float32 sums there
                    ulps = 2 if own.get("rescale") else 0
                    yield Case(f"{name}-{label}-{number}", call, "task_vectors", ulps)
            for name, own in _RANDOM.items():
                if name.startswith("della") and len(shape) > 2:
                    continue
                call = _task_vectors(name, base, models, {"weight": weights, **own})
                yield Case(f"{name}-{label}", call, None, seeded=True)
            if count >= 2:
                call = lambda api, b=base, m=models: out(api.sce(b, m, 0.3))  # noqa: E731
                # 0.1.4 takes the models in the order of a set
                yield Case(f"sce-{label}", call, "sce", 2, versions=("0.1.5",))
                yield Case(
                    f"model_stock-{label}",
                    lambda api, b=base, m=models: out(api.model_stock(b, m)),
                    "model_stock",
                    4,
                )
                yield from _spherical(label, base, models, weights)
    for shape in SHAPES:
        base, (model,) = family(3, shape, 1)
        far = tensors(4, shape, 1)[0]
        for label, other in (("near", model), ("far", far)):
            call = lambda api, a=base, b=other: out(api.slerp(0.3, a, b))  # noqa: E731
            yield Case(f"slerp-{'x'.join(map(str, shape))}-{label}", call, "slerp", 2)
    yield from _sparsify_cases()


def _spherical(label: str, base: Tensor, models: list[Tensor], weights: list[float]) -> Iterator[Case]:
    call = lambda api: out(api.karcher(models))  # noqa: E731
    yield Case(f"karcher-{label}", call, "karcher", 8)
    for origin in (None, base):
        key = f"{label}-{'deltas' if origin is not None else 'models'}"
        call = lambda api, b=origin: out(api.spherical("multislerp", b, models, weights))  # noqa: E731
        yield Case(f"multislerp-{key}", call, "multislerp", 8, versions=("0.1.5",))
        if len(models) == 2:
            call = lambda api, b=origin: out(api.spherical("nuslerp", b, models, weights))  # noqa: E731
            yield Case(f"nuslerp-{key}", call, "nuslerp", 8, versions=("0.1.5",))


def _task_vectors(
    name: str, base: Tensor, models: list[Tensor], parameters: dict[str, Any]
) -> Callable[[Any], Results]:
    return lambda api: out(api.task_vectors(name, base, models, parameters))


def _sparsify_cases() -> Iterator[Case]:
    (tensor,) = tensors(5, (37, 53), 1)
    for kind, own in (("magnitude", {}), ("magnitude_outliers", {"gamma": 0.05})):
        for norm in (None, "l1"):
            call = lambda api, k=kind, o=own, n=norm: out(api.sparsify(tensor, 0.37, k, n, o))  # noqa: E731
            yield Case(f"sparsify-{kind}-{norm}", call, "sparsify", 2 if norm else 0)


def mergekit_api() -> Any:
    return importlib.import_module("mergekit_api").api()


# -- sd-mecha -------------------------------------------------------------------------------------------


def sd_mecha_cases() -> Iterator[Case]:
    for count in (1, 2, 3, 4):
        for shape in SHAPES:
            deltas = tensors(6, shape, count)
            label = f"{count}-{'x'.join(map(str, shape))}"
            for share in (0.0, 0.29, 1.0):
                for by_value in (False, True):
                    own = {"k": share, "vote_sgn": by_value}
                    yield _sd(f"ties_sum-{label}-{share}-{by_value}", "ties_sum", deltas, own)
                    stock = {**own, "apply_stock": True}
                    key = f"ties_sum_extended-{label}-{share}-{by_value}"
                    yield _sd(key, "ties_sum_extended", deltas, stock)
                    if count > 1:
                        yield _sd(f"{key}-factor", "ties_sum_extended", deltas, own)
            if count > 1:
                yield _sd(f"model_stock-{label}", "model_stock", deltas, {})
                keyed = [{"key": delta} for delta in deltas]
                yield _sd(f"n_average-{label}", "n_average", keyed, {"key": "key"})
            if count == 2:
                yield _sd(f"slerp-{label}", "slerp", deltas, {"alpha": torch.tensor(0.3)}, ulps=4)


def _sd(name: str, function: str, operands: list[Any], own: dict[str, Any], ulps: int = 0) -> Case:
    return Case(name, lambda api: out(getattr(api, function)(*operands, **own)), function, ulps)


def sd_mecha_api() -> Any:
    importlib.import_module("sd_mecha")
    methods = "sd_mecha.extensions.builtin.merge_methods"
    ties, linear = (importlib.import_module(f"{methods}.{name}") for name in ("ties", "linear"))

    def of(module: Any, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(module, name).__wrapped__(*args, **kwargs)

    functions = {name: of(ties, name) for name in ("ties_sum", "ties_sum_extended", "model_stock")}
    functions["ties_sum_with_dropout"] = of(ties, "ties_sum_with_dropout")
    return SimpleNamespace(**functions, n_average=of(linear, "n_average"), slerp=of(linear, "slerp"))


# -- FusionBench ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, and a weight under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(13, 17), nn.Linear(17, 13), nn.Linear(13, 17)
        self.tied.weight = self.first.weight
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(tensors(seed + index, tuple(parameter.shape), 1)[0] + 0.0)  # no -0


def nets(count: int) -> tuple[Net, list[Net]]:
    base = Net(100)
    models = []
    for number in range(count):
        model, other = Net(100), Net(200 + 10 * number)
        with torch.no_grad():
            for own, far in zip(model.parameters(), other.parameters(), strict=True):
                own.add_(0.1 * far)
        models.append(model)
    return base, models


def state(model: nn.Module) -> Results:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fusion_bench_cases() -> Iterator[Case]:
    for count in (1, 2, 3, 4):
        flat = torch.stack(tensors(7, (1031,), count))
        for function in ("sum", "mean", "max"):
            for percent in (20, 0.37):
                call = lambda api, f=flat, p=percent, g=function: out(api.ties_merging(f, p, g))  # noqa: E731
                yield Case(f"ties_merging-{count}-{function}-{percent}", call, "ties_merging")
            call = lambda api, n=count, g=function: state(api.run_ties(*nets(n), 0.3, 20, g))  # noqa: E731
            yield Case(f"run_ties-{count}-{function}", call, "TiesMergingAlgorithm")
        # `task_arithmetic_merge` itself raises in this version: it adds tensors to parameters
        runs = {"run_task_arithmetic": "TaskArithmeticAlgorithm", "run_magmax": "MagMaxAlgorithm"}
        for name, hook in (*runs.items(), ("magmax_merge", "magmax_merge")):
            call = lambda api, m=name, n=count: state(getattr(api, m)(*nets(n), 0.3))  # noqa: E731
            yield Case(f"{name}-{count}", call, hook)
        yield from _dict_cases(count)
    a, b = tensors(8, (37, 53), 2)
    for label, other in (("far", b), ("near", a + 0.01 * b)):
        yield Case(f"slerp-{label}", lambda api, o=other: out(api.slerp(0.3, a, o)), "slerp", 2)


def _dicts(count: int, seed: int = 9) -> list[dict[str, Tensor]]:
    return [
        OrderedDict(zip(("b.weight", "a.bias"), pair, strict=True))
        for pair in zip(tensors(seed, (17, 13), count), tensors(seed, (29,), count), strict=True)
    ]


def _dict_cases(count: int) -> Iterator[Case]:
    dicts, weights = _dicts(count), [0.5, 1.0, -0.3, 1.25][:count]
    yield Case(f"sum-{count}", lambda api: dict(api.state_dict_sum(dicts)), "state_dict_sum")
    yield Case(f"avg-{count}", lambda api: dict(api.state_dict_avg(dicts)), "state_dict_avg")
    for name in ("state_dict_weighted_sum", "state_dict_interpolation"):
        yield Case(f"{name}-{count}", lambda api, f=name: dict(getattr(api, f)(dicts, weights)), name)
    yield Case(f"magmax_select-{count}", lambda api: dict(api.magmax_select(dicts)), "magmax_select")
    yield Case(f"emr-{count}", lambda api: _emr(*api.emr_merge(dicts)), "emr", 2)
    fishers = [{k: v.square() for k, v in one.items()} for one in _dicts(count, 10)]
    values = {name: [one[name] for one in dicts] for name in dicts[0]}
    ones = torch.ones(count) / count
    for normalize in (False, True):
        call = lambda api, n=normalize: dict(api.fisher(values, fishers, ones, n))  # noqa: E731
        yield Case(f"fisher-{count}-{normalize}", call, "fisher", 4 if normalize else 0)
    grams = [{"b": x.T @ x} for x in tensors(11, (40, 13), count)]
    call = lambda api: dict(api.regmean(values, grams, 0.1))  # noqa: E731
    yield Case(f"regmean-{count}", call, "regmean", ulps_elsewhere=4)
    base, rows = family(12, (1031,), count)
    flat = torch.stack(rows)
    multi = 0.3 * (flat - base).sum(0)
    call = lambda api: out(api.flat_task_masks(flat - base, flat, base, multi, 0.4).float())  # noqa: E731
    yield Case(f"flat_tall-{count}", call, "tall_masks")
    if count == 3:
        yield Case("tall", lambda api: dict(api.task_masks(*dicts, 0.4)), "tall_masks")


def _emr(unified: Results, masks: dict[str, list[Tensor]], rescalers: Tensor) -> Results:
    found = {f"unified.{name}": tensor for name, tensor in unified.items()} | {"rescalers": rescalers}
    return found | {f"mask.{name}": torch.stack(own).float() for name, own in masks.items()}


def fusion_bench_api() -> Any:
    return importlib.import_module("fusion_bench_api").api()


@dataclass(frozen=True)
class Peer:
    """A peer's cases, and its own functions in the form that they call."""

    cases: Callable[[], Iterator[Case]]
    api: Callable[[], Any]
    distribution: str
    random_hooks: tuple[str, ...] = field(default=())


PEERS = {
    "peft": Peer(peft_cases, peft_api, "peft"),
    "mergekit": Peer(mergekit_cases, mergekit_api, "mergekit"),
    "sd_mecha": Peer(sd_mecha_cases, sd_mecha_api, "sd-mecha"),
    "fusion_bench": Peer(fusion_bench_cases, fusion_bench_api, "fusion_bench"),
}
