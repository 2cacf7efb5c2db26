"""What every method must satisfy, and what its documentation must say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tvfast
from tests.methods.inputs import bound, exact_bits, grid, models_for, normal, scores_for
from tvfast import methods as method_registry
from tvfast.methods import METHODS, staged_methods
from tvfast.methods import base as method_base
from tvfast.methods.gram import GramMethod

# Non-trivial settings, so that every stage of a method runs; values on the dyadic grid stay exact.
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.25},
    "della_linear": {"density": 0.5, "epsilon": 0.25},
    "breadcrumbs": {"density": 0.5, "gamma": 0.125},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.125},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.25},
    "passthrough": {},
    "sta": {"density": 0.5},
    "sta_forget": {"density": 0.5},
    "fisher": {"epsilon": 0.125},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "geometric_median": {"max_iter": 5},
    "nearswap": {"t": 0.25},
    "ram": {"epsilon": 0.25},
    "ramplus_tl": {"epsilon": 0.25},
    "magmax": {},
    "magnitude_prune": {"density": 0.5},
    "lata": {"drop": "linear", "target": "base"},
}
CASES = [(name, dialect) for name in staged_methods() for dialect in METHODS[name].dialects]
TASK_VECTORS = [(n, d) for n, d in CASES if METHODS[n].needs_base and n not in ("slerp", "nearswap")]
ON_NORMS = {
    n for n in staged_methods() if n in ("slerp", "sce", "lata") or issubclass(METHODS[n].cls, GramMethod)
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
LINEAR = ("dare_linear", "della_linear", "breadcrumbs")  # without consensus


def test_every_method_has_settings() -> None:
    assert set(SETTINGS) == set(staged_methods())


# -- properties ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dialect"), CASES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (1, 1), (5, 1), (1, 5), (2, 3, 4)], ids=str)
def test_any_shape_gives_finite_values_of_that_shape(name: str, dialect: str, shape: tuple[int, ...]) -> None:
    base = normal(*shape)
    out = tvfast.merge(
        base, models_for(name, base), method=name, dialect=dialect, **SETTINGS[name], **scores_for(name, base)
    )
    assert out.shape == base.shape
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(("name", "dialect"), TASK_VECTORS)
def test_scale_0_gives_the_base(name: str, dialect: str) -> None:
    base = normal(7, 9)
    out = tvfast.merge(
        base,
        models_for(name, base),
        method=name,
        dialect=dialect,
        scale=0.0,
        **SETTINGS[name],
        **scores_for(name, base),
    )
    assert exact_bits(out, base)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_density_1_is_task_arithmetic(name: str, dialect: str) -> None:
    base, weights = normal(12, 11), [0.5, -1.25, 2.0]
    models = models_for(name, base)
    extra = {"gamma": 0.0} if name == "breadcrumbs" else {}
    out = tvfast.merge(base, models, method=name, dialect=dialect, density=1.0, weights=weights, **extra)
    assert exact_bits(out, tvfast.merge(base, models, method="task_arithmetic", weights=weights))


@pytest.mark.parametrize("name", ["dare_ties", "della", "breadcrumbs_ties"])
def test_density_1_is_ties_without_a_trim(name: str) -> None:
    base, weights = normal(12, 11), [0.5, -1.25, 2.0]
    models = models_for(name, base)
    out = tvfast.merge(base, models, method=name, weights=weights, normalize=True)
    assert exact_bits(out, tvfast.merge(base, models, method="ties", density=1.0, weights=weights))


def test_mergekit_density_1_ignores_gamma_and_epsilon() -> None:
    base = normal(40)
    models = models_for("breadcrumbs", base)
    plain = tvfast.merge(base, models, method="task_arithmetic")
    assert exact_bits(tvfast.merge(base, models, method="breadcrumbs", gamma=0.5), plain)
    assert exact_bits(tvfast.merge(base, models, method="della_linear", epsilon=0.5), plain)


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("linear", "mergekit"),
        ("sce", "mergekit"),
        ("sce", "paper"),
        ("ties", "mergekit"),
        ("ties", "paper"),
        ("ties", "peft"),
        ("ties", "sd_mecha"),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_copies_of_a_model_average_to_it(name: str, dialect: str, n: int) -> None:
    base, model = normal(101), normal(101, seed=1)
    out = tvfast.merge(base, [model] * n, method=name, dialect=dialect)
    assert bool(((out - model).double().abs() <= bound(base, [model] * n, out)).all())


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        case
        for case in CASES
        if METHODS[case[0]].n_models[1] is None
        and case[0] not in RANDOM
        and case != ("fisher", "matena_raffel")  # its floor is the first model's
        and case[0] != "magmax"  # the later model among equals
    ],
)
def test_order_of_models_is_irrelevant(name: str, dialect: str) -> None:
    # Ties by hash are keyed by the model's place, so all tied entries are kept.
    base = grid(33, 5)
    models = [base + grid(33, 5, seed=k + 1) for k in range(3)]
    scores = scores_for(name, base)
    turned = {key: value[::-1] if key == "scores" else value for key, value in scores.items()}
    settings = {"dialect": dialect, "tie": "ge", **SETTINGS[name]}
    first = tvfast.merge(base, models, method=name, **settings, **scores)
    second = tvfast.merge(base, models[::-1], method=name, **settings, **turned)
    assert bool(((first - second).double().abs() <= 2 * bound(base, models, first)).all())


@pytest.mark.parametrize(("name", "dialect"), CASES)
@pytest.mark.parametrize("in_base", [False, True])
def test_nan_reaches_the_output(name: str, dialect: str, in_base: bool) -> None:
    base = normal(64, 3)
    models = models_for(name, base)
    if in_base and not METHODS[name].needs_base:
        models[0] = base  # linear and passthrough do not read the base
    (base if in_base else models[0])[20, 1] = math.nan
    out = tvfast.merge(base, models, method=name, dialect=dialect, **SETTINGS[name], **scores_for(name, base))
    found = torch.isnan(out)
    assert bool(found[20, 1])
    if name not in ON_NORMS:  # their weights come from norms of the whole tensor
        l1 = dialect == "mergekit" and name in RANDOM
        assert l1 or int(found.sum()) == 1


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_threads_do_not_change_a_bit(name: str, dialect: str) -> None:
    base = {f"layers.{i}.w": normal(37, 65, seed=i) for i in range(4)}
    n = min(3, METHODS[name].n_models[1] or 3)
    models = [
        {key: value + 0.01 * normal(*value.shape, seed=50 + k) for key, value in base.items()}
        for k in range(n)
    ]
    outs = [
        tvfast.merge(
            base,
            models,
            method=name,
            dialect=dialect,
            n_threads=n_threads,
            **SETTINGS[name],
            **scores_for(name, base),
        )
        for n_threads in (1, 2, 3)
    ]
    assert all(exact_bits(outs[0][key], out[key]) for out in outs[1:] for key in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_widened_and_the_output_rounded_once(dtype: torch.dtype) -> None:
    # 256 - 1.0078125 does not fit 8 bits: in bfloat16 arithmetic the model would not come back.
    base = torch.full((9,), 256.0, dtype=dtype)
    model = torch.full((9,), 1.0078125, dtype=dtype)
    assert tvfast.merge(base, [model], method="task_arithmetic").equal(model)


# -- documentation ---------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHARED = {"weights", "scale", "seed", "tie", "dialect"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_documentation_names_every_parameter_and_dialect(name: str) -> None:
    sections = (DOCS / "methods.md").read_text().split("\n### ")
    section = next(part for part in sections if part.startswith(f"`{name}`\n"))
    info = METHODS[name]
    assert [p.name for p in info.parameters if p.name not in SHARED and f"`{p.name}`" not in section] == []
    assert "Source: " in section
    if name == "ties":
        suffixes = [
            d.removeprefix("fusion_bench") if d.startswith("fusion_bench_") else d for d in info.dialects
        ]
        assert [d for d in suffixes if f"{d}`" not in section] == []


def test_the_documented_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    block = (DOCS / "adding-a-method.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(method_base, "METHODS", dict(METHODS))  # the registry forgets it afterwards
    monkeypatch.setattr(method_registry, "METHODS", method_base.METHODS)
    exec(compile(block, "adding-a-method.md", "exec", dont_inherit=True), {"__name__": "documentation"})
    models = [torch.tensor([1.0, 8.0, 3.0]), torch.tensor([2.0, -9.0, 4.0]), torch.tensor([0.5, -7.0, -5.0])]
    base = torch.zeros(3)
    out = tvfast.merge(base, models, method="majority_sum", density=1.0)
    assert out.tolist() == [3.5, -16.0, 7.0]
    assert tvfast.merge(base, models, method="majority_sum", density=0.4).tolist() == [0.0, -16.0, 0.0]
