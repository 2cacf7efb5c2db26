"""The CUDA backend: on a GPU where torch finds one, otherwise the kernels' host build on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import load, missing
from tvfast.ops import cuda
from tvfast.ops.raw import Backend


@pytest.fixture(scope="session")
def _built() -> None:
    if torch.cuda.is_available():
        return
    try:
        import tvfast._C_simt  # noqa: F401
    except ImportError as error:
        missing("cuda", f"no GPU, and no host build of the kernels ({error}); build with TVFAST_SIMT=ON")


@pytest.fixture
def emulated(_built: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The CUDA backend, which `TVFAST_BACKEND` also forces on public functions."""
    monkeypatch.setenv("TVFAST_BACKEND", "cuda")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TVFAST_SIMT", "1")
    cuda.backend.cache_clear()
    yield load("cuda")
    cuda.backend.cache_clear()
