"""What mergekit-yaml and `tvfast merge` made of one recipe, side by side."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.parity.recipe_reading import members_of, place_of
from tests.parity.recipe_sources import RANDOM
from tests.parity.shards import Saved, bfloat16_steps, read, steps
from tests.parity.tied_entries import tied, trimmed

N_STEPS = 1
SIGMAS = 6.0

# What float32 may make of an entry over a step. mergekit's angles are float32 sums over whole tensors.
UNIT = 2.0**-24
MAX_UNITS = {"slerp": 64.0}
MAX_UNITS_ELSEWHERE = 4.0

# transformers rewrites config.json when mergekit saves it: old names become new ones, defaults appear.
RENAMED = {"torch_dtype": "dtype", "rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}


@dataclass
class Comparison:
    """One recipe on one family. Steps are between neighbouring values of a type."""

    recipe: str
    family: str
    method: str
    dtype: str
    n_tensors: int = 0
    n_elements: int = 0
    n_tied: int = 0  # left out of the counts below
    n_differing: int = 0
    n_over: int = 0  # by more than one step of the output's type
    max_steps: int = 0
    n_over_bfloat16: int = 0
    max_bfloat16_steps: int = 0
    # Of entries over a step: the largest difference, in units of 2^-24 of the largest operand. Where base and
    # change cancel, the last bit of a float32 sum is many steps of the result.
    max_units: float = 0.0
    statistics: dict[str, float] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def peer_recipe(
    recipe: Mapping[str, Any], family: Path, stored: str, computed: str = "float32"
) -> dict[str, Any]:
    """The recipe that makes mergekit compute in one type and round once, to the type that ours has.

    Members become absolute paths: a bare name it would look up on the model hub for its model card.
    """
    out_dtype = recipe.get("out_dtype") or recipe.get("dtype") or stored
    located: dict[str, Any] = _located(recipe, family)
    located.pop("tvfast", None)
    return {**located, "dtype": computed, "out_dtype": out_dtype}


def _located(part: Any, family: Path) -> Any:
    if isinstance(part, Mapping):
        return {key: _located(value, family) for key, value in part.items()}
    if isinstance(part, list):
        return [_located(value, family) for value in part]
    return str(family / part) if isinstance(part, str) and (family / part / "config.json").exists() else part


def compare(name: str, recipe_path: Path, family: Path, ours: Path, theirs: Path) -> Comparison:
    """Tensors, config.json and companion files; what must not differ is listed in `differences`."""
    recipe = yaml.safe_load(recipe_path.read_text())
    method = recipe["merge_method"]
    mine, peers = read(ours), read(theirs)
    found = Comparison(name, family.name, method, next(iter(mine.values())).dtype, len(mine))
    _compare_names(found, mine, peers)
    # Without a base mergekit takes the files of any of the models, one run this, another run that one's.
    unnamed = set() if "base_model" in recipe else {"max_position_embeddings"}
    found.differences += config_differences(ours, theirs, unnamed)
    tokenizer_named = "base_model" in recipe or "tokenizer_source" in recipe
    found.differences += companion_differences(ours, theirs, whose=tokenizer_named)
    shared = [name for name in mine if name in peers and mine[name].shape == peers[name].shape]
    inputs = {member: read(family / member) for member in members_of(recipe)}
    if method in RANDOM:
        pairs = {name: (mine[name], peers[name]) for name in shared}
        density = min(model["parameters"]["density"] for model in recipe["models"])
        _compare_statistics(found, pairs, inputs[recipe["base_model"]], density)
        return found
    n_layers = json.loads((family / "base" / "config.json").read_text())["num_hidden_layers"]
    for tensor in shared:
        if mine[tensor].dtype == peers[tensor].dtype:
            _compare_tensor(found, tensor, (mine[tensor], peers[tensor]), recipe, inputs, n_layers)
    if found.n_over and found.max_units > MAX_UNITS.get(method, MAX_UNITS_ELSEWHERE):
        found.differences.append(
            f"{found.n_over} entries over {N_STEPS} step, by up to {found.max_units:.1f} units of 2^-24"
        )
    return found


def _compare_tensor(
    found: Comparison,
    name: str,
    pair: tuple[Saved, Saved],
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Saved]],
    n_layers: int,
) -> None:
    apart = steps(pair[0].dtype, pair[0].bits, pair[1].bits)
    apart16 = bfloat16_steps(*pair)
    if trimmed(recipe):
        open_entries = tied(recipe, inputs, name, n_layers)
        found.n_tied += int(open_entries.sum())
        apart, apart16 = np.where(open_entries, 0, apart), np.where(open_entries, 0, apart16)
    over = apart > N_STEPS
    found.n_elements += apart.size
    found.n_differing += int(np.count_nonzero(apart))
    found.n_over += int(over.sum())
    found.max_steps = max(found.max_steps, int(apart.max(initial=0)))
    found.n_over_bfloat16 += int((apart16 > N_STEPS).sum())
    found.max_bfloat16_steps = max(found.max_bfloat16_steps, int(apart16.max(initial=0)))
    if over.any():
        place = place_of(recipe, name, n_layers)
        operands = [
            inputs[model][place.sources.get(model, name)].values()[over].astype(np.float64)
            for model in inputs
            if model in place.sources or model == recipe.get("base_model")
        ]
        largest = np.max(np.abs(operands), axis=0)
        error = np.abs(pair[0].values()[over].astype(np.float64) - pair[1].values()[over])
        found.max_units = max(found.max_units, float((error / (UNIT * largest)).max()))


def _compare_names(found: Comparison, mine: Mapping[str, Saved], peers: Mapping[str, Saved]) -> None:
    for who, extra in (
        ("only ours", mine.keys() - peers.keys()),
        ("only mergekit's", peers.keys() - mine.keys()),
    ):
        if extra:
            found.differences.append(f"tensors {who}: {', '.join(sorted(extra)[:4])} ({len(extra)})")
    for name in mine.keys() & peers.keys():
        kinds = [(saved.dtype, saved.shape) for saved in (mine[name], peers[name])]
        if kinds[0] != kinds[1]:
            found.differences.append(f"{name}: ours {kinds[0]}, mergekit's {kinds[1]}")


def config_differences(ours: Path, theirs: Path, ignored: Collection[str] = ()) -> list[str]:
    """Every key of ours that mergekit's config.json has with another value, and every key that it has not."""
    mine, peers = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    found = []
    for key, value in sorted(mine.items()):
        known = key in peers or RENAMED.get(key) in peers
        if key in ignored:
            continue
        if not known:
            found.append(f"config.json: mergekit's has no {key} ({value!r})")
        elif key in peers and peers[key] != value:
            found.append(f"config.json: {key} is {value!r}, mergekit's {peers[key]!r}")
    return found


def companion_differences(ours: Path, theirs: Path, *, whose: bool = True) -> list[str]:
    """Files of mergekit's that ours lacks, shards aside; tokenizers of other tokens, or of another model."""
    names = {
        folder: {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
        for folder in (ours, theirs)
    }
    found = [f"no {name}, which mergekit writes" for name in sorted(names[theirs] - names[ours])]
    tokenizers = [folder / "tokenizer.json" for folder in (ours, theirs)]
    if all(path.exists() for path in tokenizers):
        mine, peers = (json.loads(path.read_text())["model"]["vocab"] for path in tokenizers)
        if mine != peers:
            found.append(f"tokenizer.json: {len(mine)} tokens against {len(peers)}, or another order")
    settings = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (ours, theirs)]
    lengths = [setting["model_max_length"] for setting in settings]
    if whose and lengths[0] != lengths[1]:
        found.append(
            f"tokenizer_config.json: of another model: {lengths[0]} positions, mergekit's {lengths[1]}"
        )
    return found


def _compare_statistics(
    found: Comparison, pairs: Mapping[str, tuple[Saved, Saved]], base: Mapping[str, Saved], density: float
) -> None:
    """Share of entries that changed and mean absolute change, over the checkpoint, in standard errors.

    Both programs multiply what they keep of a tensor by one gain, which varies with the draw: for density d
    by (1 - d) / d * E[x^2] / E[|x|]^2 / n of its square. This is added to the variance of single entries.
    """
    changed = np.zeros(2)
    total, squares = np.zeros(2), np.zeros(2)
    n = 0
    for name, pair in pairs.items():
        start = base[name].values().astype(np.float64)
        n += start.size
        for who, saved in enumerate(pair):
            change = np.abs(saved.values() - start)
            changed[who] += np.count_nonzero(change)
            total[who] += change.sum()
            squares[who] += (change**2).sum()
    share, mean = changed / n, total / n
    pooled = share.mean()
    share_sigma = np.sqrt(2 * pooled * (1 - pooled) / n)
    second = squares / n
    mean_sigma = np.sqrt((second - mean**2 + (1 - density) / density * second).sum() / n)
    found.n_elements = n
    found.statistics = {
        "changed_ours": float(share[0]),
        "changed_mergekit": float(share[1]),
        "changed_sigmas": float((share[0] - share[1]) / share_sigma) if share_sigma else 0.0,
        "mean_change_ours": float(mean[0]),
        "mean_change_mergekit": float(mean[1]),
        "mean_change_sigmas": float((mean[0] - mean[1]) / mean_sigma) if mean_sigma else 0.0,
    }
    for what in ("changed", "mean_change"):
        if abs(found.statistics[f"{what}_sigmas"]) > SIGMAS:
            found.differences.append(
                f"{what}: {found.statistics[f'{what}_sigmas']:.1f} standard errors apart"
            )
