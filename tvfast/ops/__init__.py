"""The fused primitives on torch tensors, and which backends can run them; `tvfast.ops.raw` needs no torch.

Importing this package imports no torch: each function is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvfast.ops.primitives import combine, elect, measure, threshold, topk_mask
    from tvfast.ops.products import kron
    from tvfast.ops.raw import backend_statuses
    from tvfast.ops.scores import score

_HOMES = {
    "backend_statuses": "tvfast.ops.raw",
    "combine": "tvfast.ops.primitives",
    "elect": "tvfast.ops.primitives",
    "kron": "tvfast.ops.products",
    "measure": "tvfast.ops.primitives",
    "score": "tvfast.ops.scores",
    "threshold": "tvfast.ops.primitives",
    "topk_mask": "tvfast.ops.primitives",
}

__all__ = ["backend_statuses", "combine", "elect", "kron", "measure", "score", "threshold", "topk_mask"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
