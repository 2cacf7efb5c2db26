"""FusionBench's own functions as `cases` calls them. Imported by FusionBench's interpreter."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from torch import nn


def api() -> Any:
    method = "fusion_bench.method"
    arithmetic = importlib.import_module("fusion_bench.utils.state_dict_arithmetic")
    ties = importlib.import_module(f"{method}.ties_merging.ties_merging")
    tasks = importlib.import_module(f"{method}.task_arithmetic.task_arithmetic")
    magmax = importlib.import_module(f"{method}.magmax.magmax")
    slerp = importlib.import_module(f"{method}.slerp.slerp_utils")
    fisher = importlib.import_module(f"{method}.fisher_merging.fisher_merging")
    regmean = importlib.import_module(f"{method}.regmean.regmean")
    emr = importlib.import_module(f"{method}.emr_merging.utils")
    flat = importlib.import_module(f"{method}.tall_mask.utils")
    tall = importlib.import_module(f"{method}.tall_mask.task_arithmetic")

    def run_ties(base: nn.Module, models: list[nn.Module], scale: float, percent: float, how: str) -> Any:
        algorithm = ties.TiesMergingAlgorithm(
            scaling_factor=scale, threshold=percent, remove_keys=[], merge_func=how
        )
        return algorithm.run(pooled(base, models))

    def pooled(base: nn.Module, models: list[nn.Module]) -> dict[str, nn.Module]:
        return {"_pretrained_": base} | {f"model{k}": model for k, model in enumerate(models)}

    def run_task_arithmetic(base: nn.Module, models: list[nn.Module], scale: float) -> Any:
        return tasks.TaskArithmeticAlgorithm(scaling_factor=scale).run(pooled(base, models))

    def run_magmax(base: nn.Module, models: list[nn.Module], scale: float) -> Any:
        return magmax.MagMaxAlgorithm(scaling_factor=scale).run(pooled(base, models))

    # Looked up at each call, because an integration replaces them.
    def late(module: Any, name: str) -> Any:
        return lambda *args, **kwargs: getattr(module, name)(*args, **kwargs)

    sums = ("state_dict_sum", "state_dict_avg", "state_dict_weighted_sum", "state_dict_interpolation")
    return SimpleNamespace(
        ties_merging=late(ties, "ties_merging"),
        run_ties=run_ties,
        run_task_arithmetic=run_task_arithmetic,
        run_magmax=run_magmax,
        magmax_merge=late(magmax, "magmax_merge"),
        magmax_select=late(magmax, "_magmax_select"),
        slerp=late(slerp, "slerp"),
        fisher=late(fisher, "merging_with_fisher_weights"),
        regmean=late(regmean, "merging_with_regmean_weights"),
        emr_merge=late(emr, "emr_merge"),
        flat_task_masks=late(flat, "generate_task_masks"),
        task_masks=late(tall, "generate_task_masks"),
        **{name: late(arithmetic, name) for name in sums},
    )
