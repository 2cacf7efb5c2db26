"""Every test of this folder runs on the reference and on the C++ backend, through the public functions."""

from __future__ import annotations

import pytest

from tests.conftest import load


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def forced_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force the reference; for C++ take the normal choice, which leaves float64 tensors to the reference."""
    if request.param == "reference":
        monkeypatch.setenv("TVFAST_BACKEND", "reference")
    else:
        load("cpp")
        monkeypatch.delenv("TVFAST_BACKEND", raising=False)
    return str(request.param)
