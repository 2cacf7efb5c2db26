"""Other libraries' merges on tvfast's kernels: `install()` switches one on, `uninstall()` off.

    import tvfast.integrations.peft

    tvfast.integrations.peft.install()          # or: with tvfast.integrations.peft: ...
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "ab", combination_type="ties", density=0.2)
    tvfast.integrations.peft.stats()            # {"ties": 64}

`mergekit`, `peft`, `fusion_bench` and `sd_mecha` are loaded when they are named. None of the libraries is a
dependency: `install()` imports it and raises `tvfast.errors.PeerError` if it is missing or of a version that
the integration does not know. `docs/integrations.md` says what is replaced and where results differ.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvfast.integrations import fusion_bench as fusion_bench
    from tvfast.integrations import mergekit as mergekit
    from tvfast.integrations import peft as peft
    from tvfast.integrations import sd_mecha as sd_mecha

__all__ = ["fusion_bench", "mergekit", "peft", "sd_mecha"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
