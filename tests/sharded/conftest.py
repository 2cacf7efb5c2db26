"""One cluster for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sharded.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four processes, started once."""
    found = Cluster()
    yield found
    found.close()
