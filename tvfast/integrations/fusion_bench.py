"""FusionBench's merging functions and the algorithms that call them on whole models.

In float32 results have FusionBench's bits for up to four models; a norm or an angle over a tensor is exact
here and a float32 sum there. In bfloat16 and float16 FusionBench rounds after every operation; here the
result is rounded once. Merges write into the pretrained model's own memory: no stacked copies. What the
functions print is not printed.

Source: fusion_bench 0.2.33, `fusion_bench.method` and `fusion_bench.utils.state_dict_arithmetic`.
"""

from __future__ import annotations

import sys

from tvfast.integrations import _fusion_bench_arithmetic as arithmetic
from tvfast.integrations import _fusion_bench_masks as masks
from tvfast.integrations import _fusion_bench_models as models
from tvfast.integrations import _fusion_bench_statistics as statistics
from tvfast.integrations._patching import Function, Hook, Integration, IntegrationModule, same

_METHOD = "fusion_bench.method"
_ARITHMETIC = "fusion_bench.utils.state_dict_arithmetic"

# (name in stats(), module, attribute, our function)
_FUNCTIONS: tuple[tuple[str, str, str, Function], ...] = (
    ("ties_merging", f"{_METHOD}.ties_merging.ties_merging_utils", "ties_merging", models.ties_merging),
    ("ties_merging", f"{_METHOD}.fw_merging.utils", "ties_merging", models.ties_merging),
    (
        "TiesMergingAlgorithm",
        f"{_METHOD}.ties_merging.ties_merging",
        "TiesMergingAlgorithm.run",
        models.run_ties,
    ),
    (
        "task_arithmetic_merge",
        f"{_METHOD}.task_arithmetic.task_arithmetic",
        "task_arithmetic_merge",
        models.task_arithmetic_merge,
    ),
    (
        "TaskArithmeticAlgorithm",
        f"{_METHOD}.task_arithmetic.task_arithmetic",
        "TaskArithmeticAlgorithm.run",
        models.run_task_arithmetic,
    ),
    ("magmax_merge", f"{_METHOD}.magmax.magmax", "magmax_merge", models.magmax_merge),
    ("magmax_select", f"{_METHOD}.magmax.magmax", "_magmax_select", models.magmax_select),
    ("MagMaxAlgorithm", f"{_METHOD}.magmax.magmax", "MagMaxAlgorithm.run", models.run_magmax),
    ("slerp", f"{_METHOD}.slerp.slerp_utils", "slerp", models.slerp),
    (
        "fisher",
        f"{_METHOD}.fisher_merging.fisher_merging",
        "merging_with_fisher_weights",
        statistics.merging_with_fisher_weights,
    ),
    (
        "regmean",
        f"{_METHOD}.regmean.regmean",
        "merging_with_regmean_weights",
        statistics.merging_with_regmean_weights,
    ),
    ("emr", f"{_METHOD}.emr_merging.utils", "emr_merge", masks.emr_merge),
    ("tall_masks", f"{_METHOD}.tall_mask.utils", "generate_task_masks", masks.flat_task_masks),
    ("tall_masks", f"{_METHOD}.tall_mask.task_arithmetic", "generate_task_masks", masks.task_masks),
)


def _hooks(version: str) -> list[Hook]:
    found = [Hook(name, module, path, same(function)) for name, module, path, function in _FUNCTIONS]
    found.append(
        Hook("dare", f"{_METHOD}.dare.utils", "param_random_drop_", lambda original: models.drop(INTEGRATION))
    )
    for name, make in arithmetic.MAKERS.items():
        found.append(Hook(name, _ARITHMETIC, name, make))
    return found


INTEGRATION = Integration("fusion_bench", "fusion_bench", ("0.2.33",), _hooks)
install = INTEGRATION.install
uninstall = INTEGRATION.uninstall
stats = INTEGRATION.stats
fallbacks = INTEGRATION.fallbacks
sys.modules[__name__].__class__ = IntegrationModule
