"""The Triton backend in Triton's interpreter, on CPU tensors, wherever the tests run without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.conftest import load, missing
from tvfast.ops.raw import Backend

# Triton reads the variable when it is imported; commands that other tests start must not inherit it.
_ASKED_FOR = os.environ.get("TRITON_INTERPRET")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
try:
    from tvfast.ops.triton import INTERPRETED  # and with it every kernel
except ImportError as error:
    _ABSENT = str(error)
else:
    _ABSENT = "" if INTERPRETED.value else "the kernels are loaded for a GPU; set TRITON_INTERPRET=1"
if _ASKED_FOR is None:
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The Triton backend, which `TVFAST_BACKEND` also forces on public functions."""
    if _ABSENT:
        missing("triton", _ABSENT)
    monkeypatch.setenv("TVFAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # triton imports more of itself at the first launch
    # numpy, which the interpreter computes with, warns of what the kernels do on purpose.
    with np.errstate(all="ignore"):
        yield load("triton")
