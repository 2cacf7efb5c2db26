"""STA and Fisher merging of checkpoints with statistics files: the bytes of `tvfast.merge`, streamed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tvfast.errors import ArgumentError, MergeError, OutputError, RecipeError, StatisticsError
from tvfast.statistics import Document, Record, StatisticsWriter
from tvfast.statistics.tensors import array_of

SHAPES = {
    "embed.weight": (50, 16),
    "layers.0.up.weight": (37, 16),
    "layers.0.norm.weight": (16,),
    "layers.1.up.weight": (37, 16),
    "layers.1.norm.weight": (16,),
    "head.weight": (50, 16),
}
CASES = [
    ("sta", {"density": 0.25}, {}),
    ("sta", {"density": [0.25]}, {"scope": "layer", "normalization": "l1"}),
    ("sta", {"density": 0.25}, {"scope": "model", "normalization": "minmax", "cross": "winner"}),
    ("sta", {"threshold": 0.5}, {"cross": "exclude_others", "normalization": "rank"}),
    ("sta_forget", {"density": 0.25, "lambda": 0.5}, {"tie": "index"}),
    ("fisher", {}, {"dialect": "matena_raffel"}),
    ("fisher", {"epsilon": 1e-4}, {"dialect": "mats"}),
    ("fisher", {}, {"dialect": "mergelm"}),
]


def tensors(seed: int, scale: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape[0] * scale, *shape[1:], generator=generator) for name, shape in SHAPES.items()
    }


def write_stats(path: Path, scores: dict[str, Tensor], **changes: Any) -> Path:
    dtype = changes.pop("dtype", "F32")
    with StatisticsWriter(path, Document()) as writer:
        for name, mean in scores.items():
            for kind in ("weight", "delta", "fisher"):
                sums = array_of(4 * mean, name, dtype=dtype, summary=True)
                count = changes.get(name, 4)
                writer.add(Record(name, kind, tuple(mean.shape), {"sum": sums}, {"samples": count}))
    return path


class Family:
    """A base and two models with statistics, in memory and on disk."""

    def __init__(self, folder: Path, scale: int = 1) -> None:
        self.folder = folder
        self.base = tensors(0, scale)
        drawn = [tensors(k, scale) for k in (1, 2)]
        self.models = [{name: t + 0.1 * one[name] for name, t in self.base.items()} for one in drawn]
        self.scores = [{name: t.square() for name, t in tensors(k + 5, scale).items()} for k in (0, 1)]
        for name, found in (("base", self.base), ("a", self.models[0]), ("b", self.models[1])):
            (folder / name).mkdir(parents=True)
            save_file(found, folder / name / "model.safetensors")
        self.stats = [
            write_stats(folder / f"{k}.stats", one) for k, one in zip("ab", self.scores, strict=True)
        ]

    def recipe(self, method: str, parameters: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        models = [
            {"model": str(self.folder / name), "stats": str(path)}
            for name, path in zip("ab", self.stats, strict=True)
        ]
        found = {"merge_method": method, "models": models, "parameters": parameters, "tvfast": own}
        if method != "fisher":
            found["base_model"] = str(self.folder / "base")
        return found

    def merged(self, recipe: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        out = self.folder / f"out{len(list(self.folder.iterdir()))}"
        tvfast.merge_checkpoints(recipe, out, **options)
        return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(("method", "parameters", "own"), CASES, ids=lambda x: str(x).replace(" ", ""))
def test_checkpoints_merge_as_tensors_do(
    family: Family, method: str, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    found = family.merged(family.recipe(method, parameters, own))
    arguments = {**parameters, **own}
    arguments["scale"] = arguments.pop("lambda", 1.0)
    if isinstance(arguments.get("density"), list):
        arguments["density"] = 0.25
    expected = tvfast.merge(family.base, family.models, method=method, stats=family.stats, **arguments)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
def test_little_memory_gives_the_same_bytes(tmp_path: Path, scope: str) -> None:
    family = Family(tmp_path, scale=1500)
    recipe = family.recipe("sta", {"density": 0.25}, {"scope": scope, "cross": "winner"})
    roomy = family.merged(recipe)
    planned = tvfast.plan(recipe)
    with pytest.raises(ArgumentError, match="it needs at least") as found:
        tvfast.plan(recipe, memory=1)
    least = int(str(found.value).split("at least ")[1].split()[0])
    tight = tvfast.plan(recipe, memory=least)
    assert tight.peak_bytes <= least < planned.peak_bytes
    assert tight.n_passes == (1 if scope == "tensor" else 2)
    assert planned.n_passes == (2 if scope == "model" else 1)
    assert all(torch.equal(t, roomy[n]) for n, t in family.merged(recipe, memory=least).items())


def test_statistics_under_tvfast(family: Family) -> None:
    recipe = family.recipe("fisher", {}, {})
    expected = family.merged(recipe)
    paths = {model["model"]: model.pop("stats") for model in recipe["models"]}
    found = family.merged({**recipe, "tvfast": {"stats": paths}})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with pytest.raises(RecipeError, match="is no model of this recipe"):
        tvfast.plan({**recipe, "tvfast": {"stats": {"elsewhere": "x"}}})
    recipe["models"][0]["stats"] = "x"
    with pytest.raises(RecipeError, match="under tvfast, too"):
        tvfast.plan({**recipe, "tvfast": {"stats": paths}})


def test_without_statistics(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("sta", {}, {})
    recipe["models"][1].pop("stats")
    with pytest.raises(RecipeError, match=r"models\[1\].*has no stats; method 'sta' needs"):
        tvfast.plan(recipe)
    some = {name: t for name, t in family.scores[1].items() if "norm" not in name}
    recipe["models"][1]["stats"] = str(write_stats(tmp_path / "some", some))
    with pytest.raises(StatisticsError, match=r"has no weight of parameter 'layers.0.norm.weight'"):
        tvfast.plan(recipe)
    recipe["tvfast"]["on_missing_stats"] = "plain"
    with pytest.raises(StatisticsError, match="norm"):  # one of two models has them
        tvfast.plan(recipe)
    recipe["models"][0]["stats"] = str(write_stats(tmp_path / "too", some))
    planned = tvfast.plan(recipe)
    assert any("2 tensors (layers.0.norm.weight" in warning for warning in planned.warnings)
    found = family.merged(recipe)
    plain = tvfast.merge(family.base, family.models, method="task_arithmetic")
    assert torch.equal(found["layers.0.norm.weight"], plain["layers.0.norm.weight"])
    assert not torch.equal(found["layers.0.up.weight"], plain["layers.0.up.weight"])


def test_statistics_that_do_not_fit(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("fisher", {}, {})

    def refused(words: str) -> None:
        with pytest.raises(StatisticsError, match=words):
            tvfast.plan(recipe)

    other = {**family.scores[0], "head.weight": torch.ones(3)}
    recipe["models"][0]["stats"] = str(write_stats(tmp_path / "other", other))
    refused(r"'head.weight' has shape \[3\], the model's has \[50, 16\]")
    recipe["models"][0]["stats"] = str(write_stats(tmp_path / "zero", family.scores[0], **{"head.weight": 0}))
    refused("0 samples")
    recipe["models"][0]["stats"] = str(write_stats(tmp_path / "double", family.scores[0], dtype="F64"))
    refused("stored as F64")
    recipe["models"][0]["stats"] = str(tmp_path / "nothing")
    refused("no such file")
    recipe["models"][0]["stats"] = str(family.folder / "a" / "model.safetensors")
    refused("without statistics")


def test_unread_statistics_are_a_warning(family: Family) -> None:
    planned = tvfast.plan(family.recipe("task_arithmetic", {"weight": 1.0}, {}))
    assert any("reads no statistics" in warning for warning in planned.warnings)


def test_values_that_are_not_finite_are_found(family: Family, tmp_path: Path) -> None:
    path = write_stats(tmp_path / "s", family.scores[0])
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN as the last sum
    path.write_bytes(data)
    recipe = family.recipe("fisher", {}, {})
    recipe["models"][0]["stats"] = str(path)
    with pytest.raises(MergeError, match=r"'head.weight:fisher:sum' holds NaN or infinity at element 799"):
        family.merged(recipe)


def test_changed_statistics_do_not_resume(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("fisher", {}, {})
    path = write_stats(tmp_path / "s", family.scores[0])
    recipe["models"][0]["stats"] = str(path)
    out = tmp_path / "out"
    tvfast.merge_checkpoints(recipe, out)
    assert tvfast.merge_checkpoints(recipe, out, resume=True).finished_before
    write_stats(path, family.scores[1])
    with pytest.raises(OutputError, match="header"):
        tvfast.merge_checkpoints(recipe, out, resume=True)
