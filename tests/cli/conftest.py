"""Families of checkpoints that the tests of this folder merge; no test changes them."""

from __future__ import annotations

import pytest

from tests.cli.families import Family, make_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """bfloat16, two shards each."""
    return make_family(tmp_path_factory.mktemp("family"))
