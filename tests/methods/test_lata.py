"""LATA against an independent float64 statement of it, its edge cases and its errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tvfast
from tests.methods.inputs import bound, exact_bits, normal
from tvfast.errors import ArgumentError, StateDictError, UnknownNameError

State = dict[str, Tensor]
SHAPES = {
    "embed.weight": (11, 6),
    **{
        f"model.layers.{layer}.{part}": shape
        for layer in (0, 1, 2, 9, 10)
        for part, shape in (("attn.q.weight", (7, 6)), ("attn.q.bias", (7,)), ("mlp.up.weight", (8, 6)))
    },
    "norm.weight": (6,),
}
GROUP: dict[str, Callable[[str], str]] = {
    "block": lambda name: re.match(r".*?\d+", name)[0],  # type: ignore[index]
    "module": lambda name: re.match(r".*?\d+\.[a-z]+", name)[0],  # type: ignore[index]
    "tensor": lambda name: name,
}


def state(seed: int) -> State:
    return {name: normal(*shape, seed=seed * 100 + i) for i, (name, shape) in enumerate(SHAPES.items())}


def tuned(base: State, seed: int, std: float = 0.01) -> State:
    drawn = state(seed)
    return {name: tensor + std * drawn[name] for name, tensor in base.items()}


BASE = state(0)
INSTRUCT = tuned(BASE, 1)
# Part of the way to the instruct model, another part in every layer, so that cosines are apart.
TASKS = [
    {
        name: tensor + (0.1 * ((k + i) % 5)) * (INSTRUCT[name] - BASE[name])
        for i, (name, tensor) in enumerate(tuned(BASE, 2 + k).items())
    }
    for k in range(2)
]


def expected(
    base: State, instruct: State, tasks: list[State], *, share: Callable[[float, int, int], float], **own: Any
) -> State:
    """θ_target ± λ Σ w c τ as the paper says it; `share(c, r, L)` is c_kl of a cosine, a rank and a count."""
    scale, target = own.get("scale", 1.0), own.get("target", "instruct")
    sign = -1.0 if own.get("direction") == "forget" else 1.0
    weights = own.get("weights", [1.0] * len(tasks))
    outside, granularity = own.get("outside", "target"), own.get("granularity", "block")

    def group(name: str) -> str | None:
        return GROUP[granularity](name) if "layers" in name else (name if outside == "ranked" else None)

    def tau(model: State, name: str) -> Tensor:
        return (model[name].float() - base[name].float()).double()

    names = list(dict.fromkeys(found for name in base if (found := group(name)) is not None))
    out = {name: (base if target == "base" else instruct)[name].double() for name in base}
    for weight, task in zip(weights, tasks, strict=True):
        cosines = {}
        for one in names:
            members = [name for name in base if group(name) == one]
            mine = torch.cat([tau(task, name).flatten() for name in members])
            other = torch.cat([tau(instruct, name).flatten() for name in members])
            norms = float(mine.norm() * other.norm())
            cosines[one] = float(mine @ other) / norms if norms else 1.0
        ranked = sorted(names, key=lambda one: -cosines[one])
        for name in base:
            one = group(name)
            if one is not None:
                factor = share(cosines[one], ranked.index(one) + 1, len(names))
            else:
                factor = float(outside == "whole")
            out[name] += sign * scale * weight * factor * tau(task, name)
    return out


SHARES = {
    "linear": lambda c, r, n: r / n,
    "logarithmic": lambda c, r, n: math.log(r) / math.log(n),
    "threshold": lambda c, r, n: float(c < 0.2),
}


def close(out: State, wanted: State, instruct: State, tasks: list[State], base: State) -> bool:
    return all(
        bool(
            (
                (out[n].double() - w).abs()
                <= 2 * bound(base[n], [*(t[n] for t in tasks), instruct[n]], out[n])
            ).all()
        )
        for n, w in wanted.items()
    )


@pytest.mark.parametrize("drop", SHARES)
@pytest.mark.parametrize("granularity", GROUP)
@pytest.mark.parametrize("outside", ["target", "whole", "ranked"])
@pytest.mark.parametrize(
    "own",
    [{}, {"target": "base", "weights": [0.5, -1.25], "scale": 0.75}, {"direction": "forget", "scale": 0.5}],
    ids=str,
)
def test_the_formula_in_float64(drop: str, granularity: str, outside: str, own: dict[str, Any]) -> None:
    if drop == "threshold":
        own = {**own, "sigma": 0.2}
    settings = {"granularity": granularity, "outside": outside, **own}
    out = tvfast.merge(BASE, TASKS, "lata", instruct=INSTRUCT, drop=drop, **settings)
    wanted = expected(BASE, INSTRUCT, TASKS, share=SHARES[drop], **settings)
    assert close(out, wanted, INSTRUCT, TASKS, BASE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    base, instruct, *tasks = ({n: t.to(dtype) for n, t in one.items()} for one in (BASE, INSTRUCT, *TASKS))
    out = tvfast.merge(base, tasks, "lata", instruct=instruct)
    assert {tensor.dtype for tensor in out.values()} == {dtype}
    wide = [{n: t.float() for n, t in one.items()} for one in (base, instruct, *tasks)]
    wanted = tvfast.merge(wide[0], wide[2:], "lata", instruct=wide[1])
    if dtype == torch.float64:
        assert all(torch.allclose(out[n], w.double(), rtol=1e-5, atol=1e-6) for n, w in wanted.items())
    else:
        assert all(torch.equal(out[n], w.to(dtype)) for n, w in wanted.items() if "layers" in n)


def test_what_is_learned_drops_by_rank_and_what_is_forgotten_by_threshold() -> None:
    def same(own: dict[str, Any], other: dict[str, Any]) -> None:
        one, two = (tvfast.merge(BASE, TASKS, "lata", instruct=INSTRUCT, **given) for given in (own, other))
        assert all(exact_bits(one[name], two[name]) for name in one)

    same({}, {"drop": "linear", "direction": "learn", "granularity": "block", "target": "instruct"})
    same({"direction": "forget"}, {"direction": "forget", "drop": "threshold", "sigma": 0.95})


def test_tied_cosines_rank_by_the_number_of_the_layer() -> None:
    """Layers 0, 1, 2, 9, 10 follow the instruct model alike; 10 is after 9 though its name is before."""
    base = {f"layers.{layer}.w": torch.zeros(4) for layer in (10, 2, 9, 0, 1)}
    instruct = {name: torch.ones(4) for name in base}
    task = {name: torch.ones(4) * 5.0 for name in base}
    out = tvfast.merge(base, [task], "lata", instruct=instruct, target="base")
    assert {name: float(t[0]) for name, t in out.items()} == {
        "layers.0.w": 1.0,
        "layers.1.w": 2.0,
        "layers.2.w": 3.0,
        "layers.9.w": 4.0,
        "layers.10.w": 5.0,
    }
    turned = tvfast.merge(dict(reversed(base.items())), [task], "lata", instruct=instruct, target="base")
    assert all(exact_bits(out[name], turned[name]) for name in out)


def test_a_layer_without_a_direction_counts_as_aligned() -> None:
    base = {f"layers.{layer}.w": torch.zeros(2) for layer in range(4)}
    instruct = {name: torch.tensor([1.0, 0.0]) for name in base} | {"layers.2.w": torch.zeros(2)}
    task = {
        "layers.0.w": torch.tensor([0.0, 4.0]),  # cosine 0
        "layers.1.w": torch.tensor([4.0, 4.0]),
        "layers.2.w": torch.tensor([4.0, 0.0]),  # the instruct model left it alone: 1
        "layers.3.w": torch.zeros(2),  # the task did: 1, and the later of two
    }
    out = tvfast.merge(base, [task], "lata", instruct=instruct, target="base")
    assert {name: t.tolist() for name, t in out.items()} == {
        "layers.0.w": [0.0, 4.0],
        "layers.1.w": [3.0, 3.0],
        "layers.2.w": [1.0, 0.0],
        "layers.3.w": [0.0, 0.0],
    }
    out = tvfast.merge(base, [task], "lata", instruct=instruct, target="base", drop="threshold", sigma=1.0)
    assert out["layers.2.w"].tolist() == [0.0, 0.0]
    assert out["layers.1.w"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(("drop", "share"), [("linear", 1.0), ("logarithmic", 1.0)])
def test_one_layer_is_kept_whole(drop: str, share: float) -> None:
    base, instruct, task = ({"layers.0.w": torch.full((3,), float(v))} for v in (0, 1, 8))
    out = tvfast.merge(base, [task], "lata", instruct=instruct, drop=drop, target="base")
    assert out["layers.0.w"].tolist() == [8.0 * share] * 3


def test_tensors_outside_of_layers_are_the_targets_own() -> None:
    out = tvfast.merge(BASE, TASKS, "lata", instruct=INSTRUCT)
    assert all(exact_bits(out[name], INSTRUCT[name]) for name in ("embed.weight", "norm.weight"))
    out = tvfast.merge(BASE, TASKS, "lata", instruct=INSTRUCT, target="base")
    assert all(exact_bits(out[name], BASE[name]) for name in ("embed.weight", "norm.weight"))
    before = {name: tensor.clone() for name, tensor in BASE.items()}
    assert tvfast.merge_(before, TASKS, "lata", instruct=INSTRUCT, target="base") is before
    assert all(exact_bits(before[name], out[name]) for name in out)


def test_an_unknown_cosine_is_nan_where_it_counts() -> None:
    task = {name: tensor.clone() for name, tensor in TASKS[0].items()}
    task["model.layers.2.mlp.up.weight"][0, 0] = math.nan
    ranked = tvfast.merge(BASE, [task], "lata", instruct=INSTRUCT)
    assert all(bool(ranked[name].isnan().all()) == ("layers" in name) for name in ranked)
    alone = tvfast.merge(BASE, [task], "lata", instruct=INSTRUCT, drop="threshold")
    assert all(bool(alone[name].isnan().all()) == ("layers.2." in name) for name in alone)


def test_modules_and_threads() -> None:
    def module(seed: int) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [torch.nn.Linear(6, 6) for _ in range(3)]
            return torch.nn.Sequential(*layers)

    base, instruct, task = module(0), module(1), module(2)
    outs = [tvfast.merge(base, [task], "lata", instruct=instruct, n_threads=n) for n in (1, 2, 3)]
    names = dict(base.named_parameters())
    found = [dict(out.named_parameters()) for out in outs]
    assert all(exact_bits(found[0][n].detach(), one[n].detach()) for one in found for n in names)
    states = [dict(one.state_dict()) for one in (base, instruct, task)]
    wanted = tvfast.merge(states[0], [states[2]], "lata", instruct=states[1])
    assert all(exact_bits(found[0][n].detach(), wanted[n]) for n in names)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"instruct": None}, ArgumentError, "'lata' compares task vectors with that of an instruct model"),
        ({"instruct": {"a": torch.ones(2)}}, StateDictError, "instruct lacks 17 tensors"),
        (
            {"sigma": 1.5, "drop": "threshold"},
            ArgumentError,
            r"sigma is 1.5; expected a cosine, in \[-1, 1\]",
        ),
        ({"sigma": 0.5}, ArgumentError, "which drop='linear' does not use; expected drop='threshold'"),
        ({"drop": "log"}, UnknownNameError, "drop 'log' does not exist"),
        ({"granularity": "layer"}, UnknownNameError, "granularity 'layer' does not exist"),
        ({"target": "model"}, UnknownNameError, "target 'model' does not exist"),
        ({"direction": "unlearn"}, UnknownNameError, "direction 'unlearn' does not exist"),
        ({"weights": [1.0]}, ArgumentError, "weights has 1 values for 2 models"),
        ({"density": 0.5}, ArgumentError, "'lata' does not take 'density'"),
    ],
    ids=str,
)
def test_errors(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"instruct": INSTRUCT, **given}
    with pytest.raises(kind, match=message):
        tvfast.merge(BASE, TASKS, "lata", **arguments)


def test_further_errors() -> None:
    with pytest.raises(ArgumentError, match="no tensor is in a numbered layer"):
        tvfast.merge(torch.ones(3), [torch.ones(3)], "lata", instruct=torch.ones(3))
    with pytest.raises(ArgumentError, match="'ties' takes no instruct model"):
        tvfast.merge(BASE, TASKS, "ties", instruct=INSTRUCT)
    with pytest.raises(ArgumentError, match="got 0 models"):
        tvfast.merge(BASE, [], "lata", instruct=INSTRUCT)
    with pytest.raises(ArgumentError, match="lata"):
        tvfast.LiveMerge(dict(BASE), models=TASKS, method="lata")
