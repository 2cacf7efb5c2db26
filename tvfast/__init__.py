"""tvfast: merging of large language model checkpoints with task arithmetic, in place and in one pass.

Names below load on first use; `import tvfast` itself imports neither torch nor native code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvfast import analysis as analysis
    from tvfast import curvature as curvature
    from tvfast import errors as errors
    from tvfast import importance as importance
    from tvfast import integrations as integrations
    from tvfast import loops as loops
    from tvfast import methods as methods
    from tvfast import ops as ops
    from tvfast import program as program
    from tvfast import search as search
    from tvfast import statistics as statistics
    from tvfast.checkpoints import Plan as Plan
    from tvfast.checkpoints import Progress as Progress
    from tvfast.checkpoints import Recipe as Recipe
    from tvfast.checkpoints import Report as Report
    from tvfast.checkpoints import load_recipe as load_recipe
    from tvfast.checkpoints import merge_checkpoints as merge_checkpoints
    from tvfast.checkpoints import plan as plan
    from tvfast.comparing import Comparison as Comparison
    from tvfast.comparing import compare as compare
    from tvfast.extraction import Extraction as Extraction
    from tvfast.extraction import extract_lora as extract_lora
    from tvfast.live import LiveMerge as LiveMerge
    from tvfast.localizing import Localized as Localized
    from tvfast.localizing import localize as localize
    from tvfast.merging import merge as merge
    from tvfast.merging import merge_ as merge_

__version__ = "0.1.0"

_HOMES = {
    "merge_": "tvfast.merging",
    "merge": "tvfast.merging",
    "compare": "tvfast.comparing",
    "Comparison": "tvfast.comparing",
    "Extraction": "tvfast.extraction",
    "extract_lora": "tvfast.extraction",
    "LiveMerge": "tvfast.live",
    "Localized": "tvfast.localizing",
    "localize": "tvfast.localizing",
    "load_recipe": "tvfast.checkpoints",
    "merge_checkpoints": "tvfast.checkpoints",
    "plan": "tvfast.checkpoints",
    "Plan": "tvfast.checkpoints",
    "Progress": "tvfast.checkpoints",
    "Recipe": "tvfast.checkpoints",
    "Report": "tvfast.checkpoints",
}
_MODULES = (
    "analysis",
    "curvature",
    "errors",
    "importance",
    "integrations",
    "loops",
    "methods",
    "ops",
    "program",
    "search",
    "statistics",
)

__all__ = [
    "Comparison",
    "Extraction",
    "LiveMerge",
    "Localized",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "__version__",
    "analysis",
    "compare",
    "curvature",
    "errors",
    "extract_lora",
    "importance",
    "integrations",
    "load_recipe",
    "localize",
    "loops",
    "merge",
    "merge_",
    "merge_checkpoints",
    "methods",
    "ops",
    "plan",
    "program",
    "search",
    "statistics",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tvfast.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tvfast' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
