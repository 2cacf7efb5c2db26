"""The backends for GPUs: on one where torch finds it, otherwise in their stand-ins on the CPU.

Triton's stand-in is its interpreter, that of the CUDA kernels their host build. On a GPU, CPU tensors are
moved there and back, those of public functions too, so that every test is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import load, missing
from tests.devices.interpreter import repeat_nothing
from tests.devices.moving import standing_in
from tests.devices.standins import cuda_backend

# Triton reads the variable when it is imported; commands that other tests start must not inherit it.
_ASKED_FOR = os.environ.get("TRITON_INTERPRET")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
try:
    from tvfast.ops.triton import INTERPRETED  # and with it every kernel
except ImportError as error:
    _NO_TRITON = str(error)
else:
    _NO_TRITON = ""
    if not torch.cuda.is_available():
        if INTERPRETED.value:
            repeat_nothing()
        else:
            _NO_TRITON = "the kernels are loaded for a GPU; set TRITON_INTERPRET=1"
if _ASKED_FOR is None:
    os.environ.pop("TRITON_INTERPRET", None)


@contextmanager
def _triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TVFAST_BACKEND", "triton")
    if _NO_TRITON:
        missing("triton", _NO_TRITON)
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # triton imports more of itself at the first launch
    # numpy, which Triton's interpreter computes with, warns of what the kernels do on purpose.
    with np.errstate(all="ignore"):
        yield load("triton")


@contextmanager
def _of_cpu_tensors(backend: Any) -> Iterator[Any]:
    if not torch.cuda.is_available():
        yield backend
        return
    with standing_in(backend, torch.device("cuda")) as found:
        yield found


@pytest.fixture(params=[cuda_backend, _triton_backend], ids=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend for GPUs, which `TVFAST_BACKEND` also forces on public functions."""
    with request.param(monkeypatch) as backend, _of_cpu_tensors(backend) as found:
        yield found


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The Triton backend alone."""
    with _triton_backend(monkeypatch) as backend, _of_cpu_tensors(backend) as found:
        yield found
