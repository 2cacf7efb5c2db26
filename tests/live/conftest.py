"""Every test of this folder runs on the reference and on the C++ backend, through the public functions."""

from tests.methods.conftest import forced_backend
from tests.threads import one_torch_thread

__all__ = ["forced_backend", "one_torch_thread"]
