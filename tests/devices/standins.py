"""The CUDA backend as tests have it: on a GPU where torch finds one, otherwise the kernels' host build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.conftest import load, missing
from tvfast.ops import cuda


@contextmanager
def cuda_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend, which `TVFAST_BACKEND` also forces on public functions; skips where there is none."""
    monkeypatch.setenv("TVFAST_BACKEND", "cuda")
    if not torch.cuda.is_available():
        try:
            import tvfast._C_simt  # noqa: F401
        except ImportError as error:
            missing("cuda", f"no GPU, and no host build of the kernels: {error}; build with TVFAST_SIMT=ON")
        monkeypatch.setenv("TVFAST_SIMT", "1")
    cuda.backend.cache_clear()
    yield load("cuda")
    cuda.backend.cache_clear()
