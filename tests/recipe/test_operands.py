"""Which models are operands of the method, and what the base is to it."""

from __future__ import annotations

import pytest

from tests.recipe.test_parsing import LINEAR, TIES, inputs, parse, refused
from tvfast.recipe import Resolver

NUSLERP = "merge_method: nuslerp\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"


def test_the_base_is_an_input_where_the_method_has_one() -> None:
    recipe = parse(TIES)
    assert inputs(recipe) == ["a", "b", "o"]
    assert recipe.slices[0].base == 2
    listed = parse(TIES.replace("{model: a}", "{model: o}, {model: a}"))
    assert inputs(listed) == ["o", "a", "b"]
    assert listed.slices[0].base == 0
    assert Resolver(listed, 0).operands(listed.slices[0]) == [1, 2]


def test_slerp_takes_the_base_and_one_more() -> None:
    text = "merge_method: slerp\nbase_model: o\nparameters: {t: 0.5}\nmodels: [{model: a}]"
    assert inputs(parse(text)) == ["a", "o"]
    assert inputs(parse(text.replace("[", "[{model: o}, "))) == ["o", "a"]
    assert "got 2 models besides the base; expected 1 model" in refused(text.replace("[", "[{model: b}, "))
    assert "needs a base; set base_model" in refused(text.replace("base_model: o\n", ""))


def test_linear_leaves_an_unlisted_base_out() -> None:
    text = "merge_method: linear\nbase_model: o\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    recipe = parse(text)
    assert inputs(recipe) == ["a"]
    assert recipe.model_paths() == ("o", "a")
    assert recipe.donor == "o"


def test_linear_gives_an_unlisted_base_the_weight_of_all() -> None:
    """As mergekit does: base 1 at weight 2 and a model of its own weight."""
    recipe = parse("merge_method: linear\nbase_model: o\nparameters: {weight: 2}\nmodels: [{model: a}]")
    assert inputs(recipe) == ["a", "o"]
    assert len(recipe.warnings) == 1
    assert "base_model" in recipe.warnings[0]


def test_passthrough_takes_one() -> None:
    assert "got 2 models; expected 1 model" in refused(
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]"
    )
    recipe = parse("merge_method: passthrough\nbase_model: o\nmodels: [{model: a}]")
    assert inputs(recipe) == ["a"]


def test_the_base_alone_is_enough_for_task_vectors() -> None:
    assert inputs(parse("merge_method: ties\nbase_model: o\nmodels: [{model: o}]")) == ["o"]


def test_no_model_twice() -> None:
    assert "'a' is there twice" in refused(LINEAR.replace("model: b", "model: a"))


# -- an optional base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "o"])
def test_a_base_that_a_method_may_do_without_decides_what_is_interpolated(base: str | None) -> None:
    recipe = parse(NUSLERP + (f"base_model: {base}\n" if base else ""))
    assert recipe.reads_base is (base is not None)
    assert inputs(recipe) == ["a", "b", *([base] if base else [])]
    resolver = Resolver(recipe, 0)
    assert resolver.operands(recipe.slices[0]) == [0, 1]
    method = resolver.method(recipe.slices[0], [""] * 3, "", 0.0)
    assert method.reads_base is (base is not None)


def test_a_base_of_a_slice_counts() -> None:
    slices = "slices: [{base_model: o, sources: [{model: a, layer_range: [0, 2]}, "
    recipe = parse(
        "merge_method: multislerp\nparameters: {weight: 1}\n"
        + slices
        + "{model: o, layer_range: [0, 2]}]}]\n"
    )
    assert recipe.reads_base
    assert Resolver(recipe, 0).operands(recipe.slices[0]) == [0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NUSLERP.replace("weight: 1", "weight: 1, task_vectors: true"), "no such parameter"),
        (NUSLERP.replace("{model: b}", "{model: b}, {model: c}"), "got 3 models; expected 2 models"),
        (NUSLERP.replace("{weight: 1}", "{}"), "has no weight, which method 'nuslerp' needs"),
        ("merge_method: nearswap\nbase_model: o\nmodels: [{model: a}]", "has no t"),
        ("merge_method: model_stock\nbase_model: o\nmodels: [{model: a}]", "expected at least 2"),
        (
            "merge_method: ram\nbase_model: o\nparameters: {epsilon: -1}\nmodels: [{model: a}]",
            "epsilon is -1.0",
        ),
    ],
)
def test_recipes_of_the_further_methods_that_are_refused(text: str, words: str) -> None:
    assert words in refused(text)
