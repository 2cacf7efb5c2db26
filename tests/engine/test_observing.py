"""What a merge is seen to do: the numbers of a plain computation, the same bytes, on every way of a unit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tvfast
from tests.cli.families import Family, digest, load, make_family, recipe
from tests.engine.devices import small_units  # noqa: F401  (a fixture)
from tvfast.engine.observing import RUN, SHARE, Observation, summary
from tvfast.errors import MergeError

LARGE = (SHARE * 5 // 4, RUN)  # two runs are seen, or more where it is streamed


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("observed"))


def observed(config: str, out: Path, **options: Any) -> dict[str, Any]:
    (out.parent / f"{out.name}.yml").write_text(config)
    folder = out.parent / f"{out.name}-report"
    tvfast.merge_checkpoints(out.parent / f"{out.name}.yml", out, report=folder, device="cpu", **options)
    found: dict[str, Any] = json.loads((folder / "tensors.json").read_text())
    return found


def task_vectors(family: Family, name: str) -> list[Tensor]:
    return [(model[name].float() - family.base[name].float()).flatten() for model in family.models]


def test_small_tensors_are_seen_exactly(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", torch.float32)  # no ties at the threshold
    config = recipe(family, "ties", parameters={"density": 0.3}, dtype="float32")
    found = observed(config, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert found["n_tensors"] == len(found["tensors"]) == len(merged)
    for name, row in found["tensors"].items():
        base = family.base[name].double().flatten()
        delta = merged[name].double().flatten() - base
        assert row["n_seen"] == row["n_elements"] == base.numel()
        assert row["drift"] == pytest.approx((delta.norm() / base.norm()).item(), rel=1e-6)
        for k, tau in enumerate(task_vectors(family, name)):
            assert row["kept"][k] == max(1, int(0.3 * tau.numel())) / tau.numel()
            moved = tau != 0
            reversed_ = (tau.double() * delta < 0).sum()
            assert row["sign_agreement"][k] == pytest.approx(1 - int(reversed_) / int(moved.sum()), rel=1e-12)
            cosine = torch.nn.functional.cosine_similarity(tau.double(), delta, dim=0).item()
            assert row["cosines"][k] == pytest.approx(cosine, rel=1e-5)
        assert set(row["seconds"]) == {"reading", "merging", "writing"}
    drifts = [(merged[name].double() - base.double()).norm().item() for name, base in family.base.items()]
    norms = [base.double().norm().item() for base in family.base.values()]
    assert found["total"]["drift"] == pytest.approx(math.hypot(*drifts) / math.hypot(*norms), rel=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della_linear", "model_stock", "sce", "linear"])
def test_looking_changes_no_byte(family: Family, tmp_path: Path, method: str) -> None:
    parameters = {"density": 0.5} if method.startswith(("ties", "dare", "della")) else {}
    config = recipe(family, method, base=None if method == "linear" else "base", parameters=parameters)
    found = observed(config, tmp_path / "seen")
    tvfast.merge_checkpoints(tmp_path / "seen.yml", tmp_path / "plain", device="cpu")
    assert digest(tmp_path / "seen") == digest(tmp_path / "plain")
    total = found["total"]
    if method == "linear":
        assert total["drift"] is None
        assert total["sign_agreement"] == [None] * 3
    else:
        assert 0 < total["drift"] < 1
    if method in ("linear", "model_stock"):
        assert total["kept"] == [None] * 3  # nothing is trimmed
    elif method != "sce":
        assert total["kept"] == pytest.approx([0.5] * 3, abs=0.05)


def large_family(folder: Path, dtype: torch.dtype) -> list[Path]:
    generator = torch.Generator().manual_seed(3)
    base = 0.02 * torch.randn(LARGE, generator=generator)
    paths = []
    for k in range(3):
        tensor = (base + (1e-3 * torch.randn(LARGE, generator=generator) if k else 0)).to(dtype)
        paths.append(folder / f"{k}.safetensors")
        save_file({"model.layers.0.w": tensor}, paths[-1])
    return paths


def of_large(paths: list[Path], method: str, **parameters: Any) -> str:
    base, *models = map(str, paths)
    return json.dumps(
        {
            "merge_method": method,
            "base_model": base,
            "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
            "parameters": parameters,
        }
    )


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("memory", [None, 9 * 10**6], ids=["whole", "streamed"])
@pytest.mark.parametrize("method", ["ties", "della_linear"])
def test_large_tensors_are_sampled(tmp_path: Path, method: str, memory: int | None) -> None:
    paths = large_family(tmp_path, torch.bfloat16)
    found = observed(of_large(paths, method, density=0.25), tmp_path / "out", memory=memory, threads=1)
    row = found["tensors"]["model.layers.0.w"]
    assert RUN * 2 <= row["n_seen"] < row["n_elements"] / 8
    assert ("streaming" in row["seconds"]) is (memory is not None)
    assert row["kept"] == pytest.approx([0.25] * 2, abs=0.02)
    base, merged = (
        load_file_of(path)["model.layers.0.w"].double()
        for path in (paths[0], tmp_path / "out" / "model.safetensors")
    )
    assert row["drift"] == pytest.approx(((merged - base).norm() / base.norm()).item(), rel=0.02)


def load_file_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_what_was_merged_before_is_not_seen(family: Family, tmp_path: Path) -> None:
    class Stopping:
        """A disk that fills up."""

        n_written = 0

        def start(self, read_bytes: int, write_bytes: int) -> None: ...
        def read(self, n_bytes: int) -> None: ...
        def finish(self) -> None: ...

        def wrote(self, n_bytes: int) -> None:
            self.n_written += n_bytes
            raise MergeError("enough")

    config = recipe(family, "ties", parameters={"density": 0.3})
    with pytest.raises(MergeError, match="enough"):
        observed(config, tmp_path / "out", progress=Stopping())
    found = observed(config, tmp_path / "out", resume=True)
    assert found["n_tensors"] == len(family.base)
    again = observed(config, tmp_path / "out", resume=True)
    assert again["tensors"] == {}
    assert again["total"] is None


def test_models_keep_their_columns_where_slices_use_some(family: Family, tmp_path: Path) -> None:
    """A tensor that is not made of a model has None there."""
    ranges = [("ft1", "ft2", 0, 2), ("ft2", "ft3", 2, 3)]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.path("base")),
        "slices": [
            {
                "sources": [
                    {
                        "model": str(family.path(name)),
                        "layer_range": [first, last],
                        "parameters": {"weight": 1.0},
                    }
                    for name in (*names, "base")
                ]
            }
            for *names, first, last in ranges
        ],
        "dtype": "bfloat16",
    }
    found = observed(json.dumps(config), tmp_path / "out")
    assert [Path(name).name for name in found["models"]][:2] == ["ft1", "ft2"]
    ft3 = [Path(name).name for name in found["models"]].index("ft3")
    assert found["layers"]["model.layers.0"]["sign_agreement"][ft3] is None
    assert found["layers"]["model.layers.2"]["sign_agreement"][ft3] is not None
    assert found["layers"]["model.layers.2"]["sign_agreement"][0] is None


def test_infinities_of_both_signs_have_no_sum() -> None:
    up, down = Observation(1, 4, n_seen=4), Observation(1, 4, n_seen=4)
    for one, dot in ((up, math.inf), (down, -math.inf)):
        one.base, one.drift, one.models, one.dots = [1.0], [math.inf], [[math.inf]], [[dot]]
    assert summary([up, down], 1)["cosines"] == [None]


def test_what_is_seen_stands_for_the_whole_tensor() -> None:
    """A tensor that is seen in part weighs as much as one of its size that is seen as a whole."""
    part, whole = Observation(1, 1000, n_seen=10), Observation(1, 100, n_seen=100)
    part.base, part.drift, part.models, part.dots = [4.0], [1.0], [[1.0]], [[0.5]]
    whole.base, whole.drift, whole.models, whole.dots = [50.0], [2.0], [[3.0]], [[1.0]]
    part.n_moved, part.n_reversed, part.n_asked, part.n_kept = [8], [2], [20], [5]
    whole.n_moved, whole.n_reversed, whole.n_asked, whole.n_kept = [50], [10], [100], [60]
    found = summary([part, whole], 1)
    assert found["drift"] == pytest.approx(math.sqrt((100 * 1 + 2) / (100 * 4 + 50)))
    assert found["cosines"] == pytest.approx([(50 + 1) / math.sqrt(102 * 103)])
    assert found["sign_agreement"] == pytest.approx([1 - (200 + 10) / (800 + 50)])
    assert found["kept"] == pytest.approx([(250 + 60) / 1100])
