"""The CUDA backend on the tensors of its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.devices.standins import cuda_backend


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with cuda_backend(monkeypatch) as backend:
        yield backend
