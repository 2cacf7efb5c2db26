"""The comparison of checkpoints itself: it sees what differs and leaves out tied entries, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bench.checkpoints.family import PRESETS, Family
from tests.parity.recipe_comparison import compare, peer_recipe
from tests.parity.recipe_reading import members_of, place_of, value_of
from tests.parity.shards import Saved, read, steps, to_bfloat16_bits
from tests.parity.tied_entries import tied

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "ft1", "parameters": {"density": 0.5, "weight": 1}}],
}


def saved(values: list[float]) -> Saved:
    return Saved("F32", np.array(values, np.float32).view(np.uint32))


def marked(recipe: dict[str, Any], **members: list[float]) -> list[int]:
    family = {member: {"a": saved(values)} for member, values in members.items()}
    return [int(i) for i in np.flatnonzero(tied(recipe, family, "a", 1))]


def with_parameters(method: str, **parameters: Any) -> dict[str, Any]:
    return {**TIES, "merge_method": method, "models": [{"model": "ft1", "parameters": parameters}]}


# -- bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_steps_count_neighbours(dtype: str) -> None:
    width = np.uint32 if dtype == "F32" else np.uint16
    sign = 0x80000000 if dtype == "F32" else 0x8000
    left = np.array([0, 1, 5, sign, sign + 1], width)
    right = np.array([0, 2, 2, 0, 1], width)
    assert steps(dtype, left, right).tolist() == [0, 1, 3, 1, 3]


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-7], np.float32)
    assert [f"{bits:04x}" for bits in to_bfloat16_bits(values)] == ["3f80", "3f80", "3f82", "3f81", "bf81"]


# -- reading a recipe -----------------------------------------------------------------------------------

SLICED: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "parameters": {"density": 0.9, "gamma": [0.0, 0.4]},
    "slices": [
        {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "ft1", "layer_range": [3, 5]}]},
        {
            "sources": [
                {"model": "base", "layer_range": [5, 8]},
                {
                    "model": "ft2",
                    "layer_range": [5, 8],
                    "parameters": {"density": [{"filter": "mlp", "value": [0.2, 0.6]}]},
                },
            ],
            "parameters": {"density": [{"filter": "norm", "value": 0.7}]},
        },
    ],
}


def test_layers_are_found_in_their_slice() -> None:
    assert members_of(SLICED) == ["base", "ft1", "ft2"]
    first = place_of(SLICED, "model.layers.1.mlp.up_proj.weight", 8)
    assert first.sources == {
        "base": "model.layers.1.mlp.up_proj.weight",
        "ft1": "model.layers.4.mlp.up_proj.weight",
    }
    assert first.along == 1.0
    second = place_of(SLICED, "model.layers.3.mlp.up_proj.weight", 8)
    assert second.sources["ft2"] == "model.layers.6.mlp.up_proj.weight"
    assert second.along == 0.5
    assert place_of(SLICED, "model.embed_tokens.weight", 8).sources.keys() == {"base", "ft1"}
    assert place_of(SLICED, "lm_head.weight", 8).sources.keys() == {"base", "ft2"}
    with pytest.raises(ValueError, match="lies in no slice"):
        place_of(SLICED, "model.layers.5.mlp.up_proj.weight", 8)


def test_a_source_wins_over_its_slice_and_that_over_the_recipe() -> None:
    mlp = place_of(SLICED, "model.layers.3.mlp.up_proj.weight", 8)
    assert value_of(SLICED, mlp, "density", "ft2") == pytest.approx(0.4)
    norm = place_of(SLICED, "model.layers.3.input_layernorm.weight", 8)
    assert value_of(SLICED, norm, "density", "ft2") == 0.7
    attention = place_of(SLICED, "model.layers.3.self_attn.q_proj.weight", 8)
    assert value_of(SLICED, attention, "density", "ft2") == 0.9
    assert value_of(SLICED, attention, "gamma", "ft2") == pytest.approx(0.2)
    assert value_of(SLICED, attention, "select_topk") == 1.0


# -- ties -----------------------------------------------------------------------------------------------


def test_entries_at_a_cut_through_equals_are_tied() -> None:
    assert marked(TIES, base=[0, 0, 0, 0], ft1=[1, -2, 2, 3]) == [1, 2]
    assert marked(TIES, base=[0, 0, 0, 0], ft1=[1, -2, 1, 3]) == [], "the cut is between 1 and 2"
    assert marked(with_parameters("ties", density=1.0), base=[0, 0], ft1=[1, 1]) == []


def test_both_ends_of_a_band_can_be_tied() -> None:
    recipe = with_parameters("breadcrumbs", density=0.5, gamma=0.2)
    ft1 = [9, 9, 7, 6, 5, 4, 3, 3, 2, 1]
    # Two go as largest, 9 and 9; then five stay, 7 to 3: one of the two 3.
    assert marked(recipe, base=[0] * 10, ft1=[float(x) for x in ft1]) == [6, 7]
    ft1[1] = 7  # now 9 and one of the 7 go
    assert marked(recipe, base=[0] * 10, ft1=[float(x) for x in ft1]) == [1, 2, 6, 7]


def test_equal_variances_are_tied() -> None:
    models = [{"model": "ft1"}, {"model": "ft2"}]
    recipe = {**TIES, "merge_method": "sce", "models": models, "parameters": {"select_topk": 0.5}}
    found = marked(recipe, base=[0] * 4, ft1=[1, 2, 2, 4], ft2=[-1, -2, -2, -4])
    assert found == [1, 2]
    assert marked(recipe, base=[0] * 4, ft1=[1, 3, 2, 4], ft2=[-1, -3, -2, -4]) == []


# -- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    Family(PRESETS["tiny"], dtype="f32", distinct=True).write(folder)
    return folder


@pytest.fixture
def outputs(family: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A recipe and two equal outputs, both copies of a member."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({**TIES, "models": [{"model": "ft1", "parameters": {"weight": 1}}]}))
    made = Family(PRESETS["tiny"], dtype="f32", distinct=True)
    for name in ("ours", "theirs"):
        made.write_member(tmp_path / name, 1)
    return recipe, tmp_path / "ours", tmp_path / "theirs"


def test_equal_outputs_are_equal(family: Path, outputs: tuple[Path, Path, Path]) -> None:
    recipe, ours, theirs = outputs
    found = compare("same", recipe, family, ours, theirs)
    assert (found.n_differing, found.n_over, found.max_steps, found.differences) == (0, 0, 0, [])
    assert found.n_elements == sum(saved.bits.size for saved in read(ours).values())


def test_a_wrong_entry_is_seen(family: Path, outputs: tuple[Path, Path, Path]) -> None:
    recipe, ours, theirs = outputs
    (shard,) = ours.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40  # an exponent bit of the last entry
    shard.write_bytes(content)
    found = compare("wrong", recipe, family, ours, theirs)
    assert (found.n_differing, found.n_over) == (1, 1)
    assert found.max_bfloat16_steps > 1
    assert any("1 entries over 1 step" in text for text in found.differences)


def test_other_files_keys_and_tokenizers_are_seen(family: Path, outputs: tuple[Path, Path, Path]) -> None:
    recipe, ours, theirs = outputs
    (ours / "generation_config.json").unlink()
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "invented": 1}))
    tokenizer = json.loads((ours / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["filler300"] = 0
    (ours / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = "; ".join(compare("other", recipe, family, ours, theirs).differences)
    for part in ("no generation_config.json", "num_hidden_layers is 3", "has no invented", "tokenizer.json"):
        assert part in text


def test_missing_and_misshapen_tensors_are_seen(family: Path, outputs: tuple[Path, Path, Path]) -> None:
    recipe, ours, theirs = outputs
    (shard,) = ours.glob("*.safetensors")
    content = shard.read_bytes()
    assert content.count(b'"model.norm.weight"') == 1
    shard.write_bytes(content.replace(b'"model.norm.weight"', b'"model.norm.height"'))
    text = "; ".join(compare("names", recipe, family, ours, theirs).differences)
    assert "tensors only ours: model.norm.height (1)" in text
    assert "tensors only mergekit's: model.norm.weight (1)" in text


def test_random_methods_are_compared_by_their_statistics(
    family: Path, outputs: tuple[Path, Path, Path]
) -> None:
    recipe, ours, theirs = outputs
    recipe.write_text(yaml.safe_dump(with_parameters("dare_linear", density=0.5, weight=1)))
    found = compare("random", recipe, family, ours, theirs)
    assert found.differences == []
    assert found.statistics["changed_ours"] == found.statistics["changed_mergekit"] == 1.0
    Family(PRESETS["tiny"], dtype="f32", distinct=True).write_member(ours, 0)  # nothing has changed
    text = "; ".join(compare("random", recipe, family, ours, theirs).differences)
    assert "changed: -" in text
    assert "mean_change: -" in text


def test_the_peer_computes_in_float32_and_gets_paths(family: Path) -> None:
    found = peer_recipe({**TIES, "dtype": "float16"}, family, "bfloat16")
    assert (found["dtype"], found["out_dtype"]) == ("float32", "float16")
    assert found["base_model"] == str(family / "base")
    assert found["models"][0]["model"] == str(family / "ft1")
    assert found["models"][0]["parameters"] == TIES["models"][0]["parameters"]
    assert peer_recipe(TIES, family, "bfloat16")["out_dtype"] == "bfloat16"
