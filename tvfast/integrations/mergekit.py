"""mergekit's methods behind its own executor, or its whole run through our engine.

In float32 the task-vector methods have mergekit's bits for up to four models, apart from the entries that tie
at a threshold, where the first ones by index are kept and mergekit leaves the choice to a sort. Scalars that
follow from sums over a tensor (an L1 gain, an angle) are exact here and float32 sums there. In bfloat16 and
float16 mergekit rounds after every operation; here arithmetic is float32 and the result is rounded once.

Source: mergekit 0.1.5 and 0.1.4, `mergekit.merge_methods` and `mergekit.sparsify`, read for behaviour.
"""

from __future__ import annotations

import sys

from tvfast.integrations import _mergekit_0_1_4 as old
from tvfast.integrations import _mergekit_0_1_5 as new
from tvfast.integrations._mergekit import sparsify
from tvfast.integrations._mergekit_engine import run_merge
from tvfast.integrations._patching import Hook, Integration, IntegrationModule

__all__ = ["INTEGRATION", "fallbacks", "install", "stats", "uninstall"]


def _hooks(version: str) -> list[Hook]:
    sparsifying = Hook("sparsify", "mergekit.sparsify", "sparsify", lambda original: sparsify(INTEGRATION))
    own = old.hooks(INTEGRATION) if version == "0.1.4" else new.hooks(INTEGRATION)
    run = Hook("run_merge", "mergekit.merge", "run_merge", lambda original: run_merge(INTEGRATION))
    return [sparsifying, *own, run]


INTEGRATION = Integration("mergekit", "mergekit", ("0.1.4", "0.1.5"), _hooks)


def install(*, rng: str = "tvfast", engine: bool = False) -> Integration:
    """Replace mergekit's methods, and with `engine` its whole run; otherwise as for every integration.

    Args:
        rng: where DARE and DELLA draw from: "tvfast" or "peer".
        engine: `run_merge` reads, merges and writes with `tvfast.merge_checkpoints`: streaming, and with the
            arithmetic of `dtype: float32`. Recipes that the engine does not take are left to mergekit.

    Raises:
        PeerError: mergekit is not installed, or of a version that is not known.
        UnknownNameError: `rng`.
    """
    found = INTEGRATION.install(rng=rng)
    found.options["engine"] = engine
    return found


uninstall = INTEGRATION.uninstall
stats = INTEGRATION.stats
fallbacks = INTEGRATION.fallbacks
sys.modules[__name__].__class__ = IntegrationModule
