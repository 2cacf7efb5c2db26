"""Every test of this folder runs on the reference and on the C++ backend, through the public functions."""

from tests.methods.conftest import forced_backend

__all__ = ["forced_backend"]
