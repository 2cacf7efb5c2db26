"""Seeds, poisoned memory and the backends that the tests run on.

A backend that this machine or build lacks is skipped with its reason. `TVFAST_REQUIRE`, a comma-separated
list of backends (`cpp`) or of backend variants (`cpp-avx512`), turns those skips into failures.
"""

from __future__ import annotations

import importlib
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tvfast.ops.raw import Backend

os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on a network

settings.register_profile(
    "tvfast", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", parent=settings.get_profile("tvfast"), derandomize=False, max_examples=2000
)
settings.load_profile("tvfast")

_OF_MACHINE = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx2", "avx512")
NATIVE = tuple(f"cpp-{isa}" for isa in ("scalar", *_OF_MACHINE, "emulated512"))
_EVERYWHERE = ("cpp-scalar", "cpp-emulated512")  # variants that need no instruction set of their own
_POISONED = ("empty", "empty_like", "empty_strided")


def _required(variant: str) -> bool:
    names = {name.strip() for name in os.environ.get("TVFAST_REQUIRE", "").split(",")}
    if variant in names:
        return True
    return variant.split("-")[0] in names and (variant in _EVERYWHERE or "-" not in variant)


def missing(variant: str, reason: str) -> None:
    """Skips a test of a backend that is not here, or fails it where the backend is required."""
    if _required(variant):
        pytest.fail(f"TVFAST_REQUIRE demands {variant}, which is missing: {reason}")
    pytest.skip(f"{variant}: {reason}")


def load(variant: str, **options: Any) -> Backend:
    """The backend `reference` or `cpp-<isa>`; skips, or fails where it is required, if it cannot run here."""
    name, _, isa = variant.partition("-")
    try:
        module = importlib.import_module(f"tvfast.ops.{name}")
    except ImportError as error:
        # A variant of a required backend must not hide that the backend itself is missing.
        missing(name if _required(name) else variant, str(error))
    if not isa:
        return module.backend(**options)
    if isa not in module.isas():
        missing(variant, f"this machine or build runs {', '.join(module.isas())}")
    return module.backend(isa=isa, **options)


@pytest.fixture(scope="session", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Backend:
    """Every instruction set of the C++ backend."""
    return load(request.param)


@pytest.fixture(scope="session")
def natives() -> dict[str, Backend]:
    """The C++ backend of every instruction set that runs here, by variant.

    For tests that draw examples: those and what is expected of them are computed once for all.
    """
    found = {}
    for variant in NATIVE:
        with suppress(pytest.skip.Exception):  # tests of a single variant give the reason
            found[variant] = load(variant)
    if not found:
        missing("cpp", "no instruction set of it runs here")
    return found


@pytest.fixture(scope="session")
def backends(natives: dict[str, Backend]) -> dict[str, Backend]:
    """The reference at float32 and `natives`."""
    return {"reference": load("reference"), **natives}


@pytest.fixture(scope="session", params=NATIVE)
def native_with(request: pytest.FixtureRequest) -> Callable[..., Backend]:
    """Makes the C++ backend of every instruction set, with options such as `tile`."""
    variant: str = request.param
    load(variant)
    return lambda **options: load(variant, **options)


@pytest.fixture(scope="session", params=("reference", *NATIVE))
def backend(request: pytest.FixtureRequest) -> Backend:
    """The reference at float32 and every instruction set of the C++ backend."""
    return load(request.param)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _poison() -> Iterator[None]:
    """Fills float memory that tvfast allocates uninitialised with NaN, so that unwritten elements show."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _POISONED:
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.partition(".")[0] == "tvfast" and tensor.is_floating_point() and not tensor.is_meta:
            tensor.detach().fill_(float("nan"))
        return tensor

    return allocate_and_fill
