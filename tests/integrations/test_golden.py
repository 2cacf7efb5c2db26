"""Our functions against what the peers gave: golden files of live.py, made by the peers themselves."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.integrations.cases import PEERS, Case, apart
from tests.integrations.ours import OURS, fusion_bench_pool
from tvfast.integrations._patching import NotServed
from tvfast.methods import METHODS

GOLDEN = Path(__file__).with_name("golden")
# Spherical means that this tvfast has no methods for.
MISSING = {"nuslerp", "multislerp", "karcher"} - METHODS.keys()
VERSIONS = {"peft": "0.21.2", "mergekit": "0.1.5", "sd_mecha": "1.1.8", "fusion_bench": "0.2.33"}


@pytest.fixture(autouse=True)
def model_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported of FusionBench: a function that makes a pool of models."""
    for name in ("fusion_bench", "fusion_bench.compat", "fusion_bench.compat.modelpool"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    stub = sys.modules["fusion_bench.compat.modelpool"]
    monkeypatch.setattr(stub, "to_modelpool", fusion_bench_pool, raising=False)


def difference(case: Case, name: str, golden: dict[str, np.ndarray]) -> str | None:
    """What is wrong with a result, if anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no pruning will be performed"
        found = case.call(OURS[name])
    wanted = {
        key.partition("|")[2]: value for key, value in golden.items() if key.startswith(f"{case.name}|")
    }
    if found.keys() != wanted.keys():
        return f"{case.name}: {sorted(found)} for {sorted(wanted)}"
    for key, value in wanted.items():
        own, theirs = found[key], torch.from_numpy(value)
        if (own.shape, own.dtype) != (theirs.shape, theirs.dtype):
            return f"{case.name}, {key}: {own.dtype} {own.shape} for {theirs.dtype} {theirs.shape}"
        allowed = case.ulps if case.ulps_elsewhere is None else case.ulps_elsewhere
        distance = apart(own, theirs, allowed)
        if not distance <= allowed:
            return f"{case.name}, {key}: {distance} ulp apart, at most {allowed} are allowed"
    return None


@pytest.mark.parametrize("name", PEERS)
def test_results_are_the_peers(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {key: file[key] for key in file.files}
    record = json.loads(bytes(golden.pop("record")).decode())
    assert (record["peer"], record["version"]) == (PEERS[name].distribution, VERSIONS[name])
    served = [
        case
        for case in PEERS[name].cases()
        if not case.seeded and case.hook is not None and (name != "mergekit" or case.hook not in MISSING)
    ]
    assert len(served) > 50
    wrong = [text for case in served if (text := difference(case, name, golden))]
    assert not wrong, f"{len(wrong)} of {len(served)} cases differ:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_served_is_said_before_anything_is_done(name: str) -> None:
    for case in PEERS[name].cases():
        if case.hook is None and not case.seeded:
            with pytest.raises(NotServed):
                case.call(OURS[name])
