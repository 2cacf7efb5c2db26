"""Golden files of mergekit, our merge of the same inputs, and how far apart they may be."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import tvfast
from tests.bounds import UNIT
from tests.parity.parity_cases import Arc, wide_arc
from tvfast.methods import METHODS

Array = npt.NDArray[Any]

GOLDEN = Path(__file__).parent / "golden"
N_ULPS = 1
RECIPE_NAMES = {"weight": "weights", "lambda": "scale"}  # mergekit's name -> ours, where they differ
WAYS = ("one", "two", "batch")  # in which the peer's float32 runs of an arc were made
DROPPED = {"int8_mask"}  # changes only the dtype of mergekit's temporaries


@dataclass
class Golden:
    """One file: its record and its arrays."""

    record: dict[str, Any]
    arrays: dict[str, Array]


def load(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Golden(json.loads(arrays.pop("record").tobytes()), arrays)


def ours(parameters: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A recipe's parameters as keyword arguments of `tvfast.merge`."""
    translated = {
        RECIPE_NAMES.get(key, key): value for key, value in parameters.items() if key not in DROPPED
    }
    if method == "passthrough" and "scale" in translated:
        (translated["scale"],) = translated["scale"]
    return translated


def merged(
    method: str,
    base: Mapping[str, Array],
    models: Sequence[Mapping[str, Array]],
    parameters: Mapping[str, Any],
    **more: Any,
) -> dict[str, Array]:
    """`tvfast.merge` of state dicts of arrays; the mergekit dialect is the default one."""
    out = tvfast.merge(
        {name: torch.from_numpy(x) for name, x in base.items()},
        [{name: torch.from_numpy(x) for name, x in model.items()} for model in models],
        method=method,
        **ours(parameters, method),
        **more,
    )
    return {name: tensor.numpy() for name, tensor in out.items()}


def ulps(left: Array, right: Array) -> Array:
    """Steps between float32 values on the line of all float32 values; -0 and +0 are one step apart."""

    def place(x: Array) -> Array:
        bits = np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)

    return np.abs(place(left) - place(right))


def assert_within_ulps(
    found: Mapping[str, Array], expected: Mapping[str, Array], what: str, most: int = N_ULPS
) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        apart = ulps(found[name], wanted)
        worst = np.unravel_index(int(apart.argmax()), apart.shape)
        assert apart[worst] <= most, (
            f"{what}, tensor {name!r}: {int((apart > most).sum())} of {apart.size} entries differ by more "
            f"than {most} ulp; at {tuple(map(int, worst))} by {apart[worst]}: "
            f"found {found[name][worst]!r}, mergekit {wanted[worst]!r}"
        )


def assert_within_rounding(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    what: str,
    operands: Sequence[Mapping[str, Array]],
) -> None:
    """slerp's float32 sums of c_k x_k against their float64 values; the probes show c_k.

    Each term is rounded with its coefficient, its product and K - 1 additions.
    """
    n_roundings = len(operands) + 1.0
    for name, wanted in expected.items():
        coefficients = wanted.flat[:2]
        values = [operand[name].astype(np.float64) for operand in operands]
        terms = sum(np.abs(c * x) for c, x in zip(coefficients, values, strict=True))
        over = np.abs(found[name] - wanted) > n_roundings * UNIT * terms
        assert not over.any(), f"{what}, tensor {name!r}: {int(over.sum())} entries beyond their bound"


def assert_near_the_formula(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    what: str,
    base: Mapping[str, Array],
    models: Sequence[Mapping[str, Array]],
) -> None:
    """Sums of float32 products against the peer in float64.

    A task vector, its coefficient, their product, K additions, the scale and the base are rounded once each;
    no operand is larger than all of them together, and no coefficient here above 2.
    """
    n_roundings = len(models) + 5.0
    for name, wanted in expected.items():
        size = np.abs(base[name]) + sum(np.abs(model[name]) + np.abs(base[name]) for model in models)
        over = np.abs(found[name] - wanted) > n_roundings * UNIT * 2 * size
        assert not over.any(), f"{what}, tensor {name!r}: {int(over.sum())} entries beyond their bound"


def check_case(golden: Golden, case: Mapping[str, Any]) -> None:
    """One deterministic case, all tensors of its family in one call."""
    prefix = f"output/{case['name']}/"
    expected = {key.removeprefix(prefix): x for key, x in golden.arrays.items() if key.startswith(prefix)}
    assert expected, f"no output of case {case['name']}"
    base, *models = (
        {name: golden.arrays[f"input/{case['family']}/{name}/{place}"] for name in expected}
        for place in range(case["models"] + 1)
    )
    optional = {"task_vectors": case["base"]} if METHODS[case["method"]].optional_base else {}
    found = merged(case["method"], base, models, case["parameters"], **optional)
    if case["float64"] and case["method"] != "slerp":
        assert_near_the_formula(found, expected, case["name"], base, models)
    elif case["float64"]:
        assert_within_rounding(found, expected, case["name"], [base, *models])
    else:
        assert_within_ulps(found, expected, case["name"], case["ulps"])


def check_arc(golden: Golden, recorded: Mapping[str, Any]) -> None:
    """slerp on a wide arc: as near to the peer's formula as float32 can be, so never farther than the peer.

    The peer sums in float32, and its coefficients differ from run to run of its own; see docs/methods.md.
    """
    arc = Arc(recorded["n"], recorded["degrees"], recorded["t"])
    pair = wide_arc(arc)
    assert [zlib.crc32(x.tobytes()) for x in pair] == recorded["crc32"], "numpy drew other inputs"
    exact = golden.arrays[f"float64/{arc.name}"]
    found = merged("slerp", {"x": pair[0]}, [{"x": pair[1]}], {"t": arc.t})["x"]
    assert found[:2].tolist() == exact.astype(np.float32).tolist()
    for way in WAYS:
        peers = golden.arrays[f"float32/{arc.name}/{way}"].astype(np.float64)
        assert (np.abs(found[:2] - exact) <= np.abs(peers - exact)).all(), f"{arc.name}, {way}"
    wanted = exact[0] * pair[0].astype(np.float64) + exact[1] * pair[1].astype(np.float64)
    assert_within_rounding({"x": found}, {"x": wanted}, arc.name, [{"x": x} for x in pair])


def peer_spread(golden: Golden) -> int:
    """Ulps between float32 coefficients of the peer's own runs on the same input, at most."""
    spread = 0
    for recorded in golden.record["arcs"]:
        name = Arc(recorded["n"], recorded["degrees"], recorded["t"]).name
        runs = [golden.arrays[f"float32/{name}/{way}"] for way in WAYS]
        spread = max(spread, *(int(ulps(runs[0], run).max()) for run in runs[1:]))
    return spread


def check_checkpoint(golden: Golden, method: str) -> None:
    """One run of mergekit-yaml, merged here from the same state dicts."""
    recipe = golden.record["recipes"][method]
    parameters = dict(recipe["parameters"]) | recipe.get("per_model", {})
    if "weights" in recipe:
        parameters["weight"] = recipe["weights"]

    def member(kind: str) -> dict[str, Array]:
        prefix = f"{kind}/"
        return {key.removeprefix(prefix): x for key, x in golden.arrays.items() if key.startswith(prefix)}

    models = [member(f"input/ft{place}") for place in range(3)]
    expected = member(f"output/{method}")
    assert expected
    assert_within_ulps(merged(method, member("input/base"), models, parameters), expected, method)
