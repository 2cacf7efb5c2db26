"""What is merged for parity: inputs from seeds, and cases. numpy only: it also runs beside the peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Family = dict[str, list[Array]]  # tensor name -> [base, model 0, model 1, ...]

SEED = 20261
SHAPES = {
    "matrix": (24, 29),
    "vector": (100,),
    "row": (1, 41),
    "cube": (5, 6, 7),
    "conv": (6, 5, 3, 3),
}
N_MODELS = 3
N_CROWD = 21


@dataclass(frozen=True)
class Case:
    """One merge of one family; `parameters` have the peer's names."""

    name: str
    method: str
    family: str
    parameters: dict[str, Any] = field(default_factory=dict)
    models: int = N_MODELS
    float64: bool = False  # the peer runs in float64: its formula without its roundings
    base: bool = True  # whether the peer is given the base
    ulps: int = 1  # how far apart float32 results may be
    shapes: tuple[str, ...] = tuple(SHAPES)


def _finetune(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """Small changes of small weights, as real fine-tunes have."""
    base = rng.normal(0, 0.02, shape)
    return [base, *(base + rng.normal(0, 5e-4, shape) for _ in range(N_MODELS))]


def _wide(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """Changes as large as the base, in either direction."""
    base = rng.normal(0, 1, shape)
    return [base, *(base + rng.normal(0, 1, shape) for _ in range(N_MODELS))]


def _dominant(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """|base| in [1, 2), changes below a quarter of it: a rounding of a sum over a tensor stays below an ulp.

    Models change by different amounts, so that weights from norms differ.
    """
    base = rng.uniform(1, 2, shape) * rng.choice([-1, 1], shape)
    return [
        base,
        *(base + np.clip(rng.normal(0, 0.03 * (k + 1), shape), -0.24, 0.24) for k in range(N_MODELS)),
    ]


def _probed(base: npt.NDArray[Any], model: npt.NDArray[Any]) -> list[Array]:
    """Two entries are (1, 0) and (0, 1): an interpolation shows its two coefficients there."""
    base.flat[:2] = (1, 0)
    model.flat[:2] = (0, 1)
    return [base, model]


def _apart(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """One model at a wide angle from the base but of the same signs, so that nothing cancels between them."""
    base = rng.uniform(1, 2, shape) * rng.choice([-1, 1], shape)
    return _probed(base, base * rng.uniform(0.2, 1.8, shape))


def _across(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """A base and a model that have nothing in common."""
    return _probed(rng.normal(0, 1, shape), rng.normal(0, 2, shape))


def _crowd(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """More models than the peer's sum of weights has lanes."""
    return [rng.normal(0, 1, shape) for _ in range(N_CROWD + 1)]


def _short(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Array]:
    """bfloat16 values, whose products with weights of 16 bits are exact in float32."""
    return [_truncated(x) for x in _wide(rng, shape)]


def _truncated(x: npt.NDArray[Any]) -> Array:
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


_MAKERS = {
    "finetune": _finetune,
    "wide": _wide,
    "dominant": _dominant,
    "short": _short,
    "apart": _apart,
    "across": _across,
    "crowd": _crowd,
}
_SHAPES_OF = {"crowd": ("vector", "row")}
_RANKED = ("finetune", "wide", "dominant")


def tie_free(arrays: list[Array]) -> bool:
    """Whether every task vector has distinct magnitudes, and so has its variance over models."""
    taus = [model - arrays[0] for model in arrays[1:]]
    variance = np.var(np.stack(taus).astype(np.float64), axis=0).astype(np.float32)
    return all(np.unique(np.abs(x)).size == x.size for x in (*taus, variance))


def make_families(accept: Callable[[str, list[Array]], bool]) -> dict[str, Family]:
    """Every family; a tensor is drawn again until it is tie-free, where it is ranked, and accepted."""
    families: dict[str, Family] = {}
    for number, (family, make) in enumerate(_MAKERS.items()):
        tensors: Family = {}
        for place, (name, shape) in enumerate(SHAPES.items()):
            if name not in _SHAPES_OF.get(family, SHAPES):
                continue
            for attempt in range(5000):
                rng = np.random.default_rng([SEED, number, place, attempt])
                arrays = [np.ascontiguousarray(x, np.float32) for x in make(rng, shape)]
                if (family not in _RANKED or tie_free(arrays)) and accept(family, arrays):
                    break
            else:
                raise RuntimeError(f"no usable draw of {family}/{name}")
            tensors[name] = arrays
        families[family] = tensors
    return families


@dataclass(frozen=True)
class Arc:
    """Two tensors of `n` entries about `degrees` apart, interpolated at `t`."""

    n: int
    degrees: int
    t: float

    @property
    def name(self) -> str:
        return f"{self.n}-{self.degrees}-{self.t}"


ARCS = tuple(
    Arc(n, degrees, t) for n in (1000, 200_000, 3_000_000) for degrees in (45, 90, 135) for t in (0.3, 0.5)
)


def wide_arc(arc: Arc) -> list[Array]:
    """[base, model]; entries uniform, with the two probes of `_probed`."""
    rng = np.random.default_rng([SEED, arc.n, arc.degrees])
    angle = np.deg2rad(arc.degrees)
    base, other = rng.random(arc.n) - 0.5, rng.random(arc.n) - 0.5
    model = np.cos(angle) * base + np.sin(angle) * other
    return [x.astype(np.float32) for x in _probed(base, model)]


SLERP_T = (0.0, 0.3, 0.5, 0.85, 1.0)


def cases() -> Iterator[Case]:
    """Cases whose result is determined by their inputs."""
    yield Case("linear-mean", "linear", "finetune", {"weight": [1.0, 1.0, 1.0]})
    yield Case("linear-sum", "linear", "short", {"weight": [0.5, 0.25, 0.75], "normalize": False})
    yield Case("linear-negative", "linear", "short", {"weight": [1.5, -0.375, 0.40625]})
    yield Case("linear-finetune", "linear", "finetune", {"weight": [0.3, 0.7, 0.25]})
    yield Case("linear-wide", "linear", "wide", {"weight": [0.3, -0.7, 1.9]})
    yield Case("linear-wide-sum", "linear", "wide", {"weight": [1 / 3, 0.1, -0.6], "normalize": False})
    yield Case("linear-dominant", "linear", "dominant", {"weight": [0.61, 0.17, 0.22]})
    for n in (5, 7, 8, 9, 13, 17, 21):
        weights = [round(0.1 + 0.37 * k % 0.93, 3) for k in range(n)]
        yield Case(f"linear-crowd-{n}", "linear", "crowd", {"weight": weights}, models=n)
    yield Case("linear-one", "linear", "short", {"weight": [3.0]}, models=1)

    yield Case("slerp-near", "slerp", "finetune", {"t": 0.3}, models=1)
    for t in SLERP_T:
        yield Case(f"slerp-apart-{t}", "slerp", "apart", {"t": t}, models=1)
        yield Case(f"slerp-across-{t}", "slerp", "across", {"t": t}, models=1, float64=True)

    yield Case("passthrough", "passthrough", "wide", {}, models=1)
    yield Case("passthrough-scale", "passthrough", "wide", {"scale": [-0.7]}, models=1)

    yield from _sphere_cases()
    yield from _entry_cases()

    yield Case("ta", "task_arithmetic", "finetune", {"weight": [0.5, 0.3, 0.2]})
    yield Case("ta-one", "task_arithmetic", "finetune", {"weight": [1.0]}, models=1)
    yield Case("ta-lambda", "task_arithmetic", "wide", {"weight": [1.0, -0.7, 0.35], "lambda": 0.4})
    normalized = {"weight": [1.5, -0.25, 0.5], "normalize": True, "lambda": 1.3}
    yield Case("ta-normalize", "task_arithmetic", "wide", normalized)
    yield Case("ta-cancel", "task_arithmetic", "wide", {"weight": [1.0, -2.0, 1.0], "normalize": True})

    yield Case("ties", "ties", "finetune", {"weight": [1.0, 1.0, 1.0], "density": 0.2})
    mixed = {"weight": [0.6, -0.3, 1.7], "density": [0.1, 0.5, 0.9], "lambda": 0.8}
    yield Case("ties-mixed", "ties", "finetune", mixed)
    summed = {"weight": [0.5, 1.0, 0.25], "density": 0.3, "normalize": False}
    yield Case("ties-sum", "ties", "wide", summed)
    yield Case("ties-all", "ties", "wide", {"weight": [1.0, 2.0, 3.0], "density": 1.0})
    yield Case("ties-default", "ties", "wide", {"weight": [1.0, 1.0, -1.0]})
    yield Case("ties-least", "ties", "wide", {"weight": [1.0, 0.5, 2.0], "density": 1e-6})
    yield Case("ties-none", "ties", "wide", {"weight": [1.0, 0.5, 2.0], "density": 0.0})
    yield Case(
        "ties-rescale", "ties", "dominant", {"weight": [1.0, 0.5, 0.8], "density": 0.4, "rescale": True}
    )
    yield Case("ties-one", "ties", "finetune", {"weight": [0.7], "density": 0.29}, models=1)
    yield Case("ties-two", "ties", "wide", {"weight": [0.7, 0.3], "density": [0.57, 0.29]}, models=2)

    for method in ("breadcrumbs", "breadcrumbs_ties"):
        equal = {"weight": [1.0, 0.6, 0.8]}
        yield Case(method, method, "finetune", {**equal, "density": 0.6, "gamma": 0.1})
        yield Case(f"{method}-default", method, "wide", {"weight": [0.5, -0.5, 1.0], "density": 0.9})
        yield Case(f"{method}-over", method, "wide", {**equal, "density": 0.9, "gamma": 0.3})
        yield Case(f"{method}-no-outliers", method, "finetune", {**equal, "density": 0.3, "gamma": 0.0})
        yield Case(f"{method}-all", method, "wide", {**equal, "density": 1.0, "gamma": 0.2})
        yield Case(f"{method}-none", method, "wide", {**equal, "density": 0.0, "gamma": 0.2})
        ranges = {"density": [0.2, 0.5, 0.8], "gamma": [0.05, 0.0, 0.15], "normalize": True, "lambda": 0.9}
        yield Case(f"{method}-mixed", method, "finetune", {**equal, **ranges})

    yield Case("sce", "sce", "finetune", {})
    for share in (0.29, 0.58, 0.0, 1e-6):
        yield Case(f"sce-{share}", "sce", "finetune", {"select_topk": share})
    yield Case("sce-norms", "sce", "dominant", {})
    yield Case("sce-norms-0.3", "sce", "dominant", {"select_topk": 0.3})
    yield Case("sce-two", "sce", "dominant", {"select_topk": 0.5}, models=2)


_FEW = ("vector", "row", "cube")


def _sphere_cases() -> Iterator[Case]:
    """Coefficients from norms and dot products: to an ulp where they scale little, else against float64."""
    pair, three = {"weight": [0.3, 0.9]}, {"weight": [0.5, 1.0, 0.25]}
    yield Case("nuslerp", "nuslerp", "dominant", pair, models=2)
    yield Case("multislerp", "multislerp", "dominant", three)
    # The peer rounds the mean twice, 1 - t, both products and their sum: half an ulp of the base each.
    yield Case("stock", "model_stock", "dominant", {}, ulps=3)
    yield Case("stock-two", "model_stock", "dominant", {}, models=2, ulps=3)
    rows = {"filter_wise": True}  # rows of three entries have cosines that float32 is 68 ulps off with
    yield Case("stock-rows", "model_stock", "dominant", rows, ulps=3, shapes=("matrix", *_FEW))
    yield Case("multislerp-one", "multislerp", "wide", {"weight": [0.7]}, models=1, base=False)
    yield Case("karcher-one", "karcher", "wide", {}, models=1, base=False)
    for family in ("wide", "finetune"):
        exact = {"float64": True, "shapes": _FEW}
        for base in (True, False):
            name = f"{family}-{'base' if base else 'models'}"
            yield Case(f"nuslerp-{name}", "nuslerp", family, pair, models=2, base=base, **exact)
            yield Case(f"multislerp-{name}", "multislerp", family, three, base=base, **exact)
        for along in (True, False):
            rows = {**pair, "nuslerp_flatten": False, "nuslerp_row_wise": along}
            yield Case(f"nuslerp-rows-{along}-{family}", "nuslerp", family, rows, models=2, **exact)
        yield Case(f"karcher-{family}", "karcher", family, {}, base=False, **exact)
        yield Case(f"karcher-{family}-2", "karcher", family, {"max_iter": 2}, base=False, **exact)
        yield Case(f"stock-{family}", "model_stock", family, {}, **exact)
        yield Case(f"stock-rows-{family}", "model_stock", family, {"filter_wise": True}, **exact)
    unnormed = {**three, "normalize_weights": False}
    yield Case("multislerp-sum", "multislerp", "wide", unnormed, float64=True, shapes=_FEW)


def _entry_cases() -> Iterator[Case]:
    """Entry by entry; of one model by the divergence of its rows."""
    for t in (1e-4, 3e-4, 0.0):
        yield Case(f"nearswap-{t}", "nearswap", "finetune", {"t": t}, models=1, shapes=_FEW)
    yield Case("nearswap-wide", "nearswap", "wide", {"t": 0.5}, models=1)
    for epsilon in (1e-5, 0.03):
        yield Case(f"ram-{epsilon}", "ram", "dominant", {"epsilon": epsilon}, shapes=_FEW)
        plus = {"epsilon": epsilon, "r": 0.5, "alpha": 0.75}
        yield Case(f"ramplus-{epsilon}", "ramplus_tl", "dominant", plus, shapes=_FEW)
    yield Case("ram-two", "ram", "dominant", {"epsilon": 0.02}, models=2)
    yield Case("ramplus", "ramplus_tl", "dominant", {}, models=2)
    for family in ("wide", "finetune"):
        exact = {"float64": True, "shapes": ("matrix", "vector", "cube")}
        yield Case(f"fusion-{family}", "arcee_fusion", family, {}, models=1, **exact)


@dataclass(frozen=True)
class RandomCase:
    """One random merge of `random_inputs`, drawn `draws` times."""

    name: str
    method: str
    parameters: dict[str, Any]
    models: int
    draws: int = 3000


RANDOM_SHAPE = (6, 48)


def random_inputs() -> list[Array]:
    """[base, model 0, 1, 2] of `RANDOM_SHAPE`, tie-free."""
    rng = np.random.default_rng([SEED, 99])
    arrays = [np.ascontiguousarray(x, np.float32) for x in _wide(rng, RANDOM_SHAPE)]
    if not tie_free(arrays):
        raise RuntimeError("the random inputs have ties")
    return arrays


def random_cases() -> Iterator[RandomCase]:
    """One model for keep rates, three for the merged entry; with and without rescaling."""
    three = [1.0, 0.6, -0.4]
    yield RandomCase("dare-keep", "dare_linear", {"weight": [1.0], "density": 0.3}, 1)
    yield RandomCase("della-keep", "della_linear", {"weight": [1.0], "density": 0.5, "epsilon": 0.3}, 1)
    yield RandomCase("della-keep-skew", "della_linear", {"weight": [1.0], "density": 0.8, "epsilon": 0.15}, 1)
    yield RandomCase("dare_linear", "dare_linear", {"weight": three, "density": 0.5}, 3)
    raw = {"weight": three, "density": [0.3, 0.6, 0.9], "rescale": False, "lambda": 0.7}
    yield RandomCase("dare_linear-raw", "dare_linear", raw, 3)
    yield RandomCase("dare_ties", "dare_ties", {"weight": three, "density": 0.5}, 3)
    yield RandomCase(
        "dare_ties-normalize", "dare_ties", {"weight": three, "density": 0.6, "normalize": True}, 3
    )
    yield RandomCase("della", "della", {"weight": [1.0, 0.6, 0.8], "density": 0.5, "epsilon": 0.2}, 3)
    yield RandomCase("della_linear", "della_linear", {"weight": three, "density": 0.6}, 3)
