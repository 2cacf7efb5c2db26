"""Several recipes in one file."""

from __future__ import annotations

import pytest

from tvfast.errors import RecipeError
from tvfast.recipe import parse_recipe

LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"


def document(*models: str, name: str | None = None, key: str = "name", more: str = "") -> str:
    listed = ", ".join(f"{{model: {model}}}" for model in models)
    return LINEAR + f"models: [{listed}]\n" + (f"{key}: {name}\n" if name else "") + more


def parsed(*documents: str) -> tuple[list[str | None], tuple[str, ...]]:
    """Names of the stages in their order, and the models of the result."""
    recipe = parse_recipe("---\n".join(documents), "r.yml")
    assert recipe.name is None
    assert all(not stage.stages for stage in recipe.stages)
    return [stage.name for stage in recipe.stages], recipe.model_paths()


def test_stages_come_after_what_they_need() -> None:
    found = parsed(
        document("two", "d"), document("one", "c", name="two"), document("a", "b", name="one"), "# nothing\n"
    )
    assert found == (["one", "two"], ("two", "d"))


def test_a_stage_is_merged_once() -> None:
    found = parsed(
        document("a", name="x"),
        document("x", "b", name="y"),
        document("x", "c", name="z"),
        document("y", "z"),
    )
    assert found == (["x", "y", "z"], ("y", "z"))


def test_with_names_everywhere_the_last_is_the_result() -> None:
    assert parsed(document("a", name="x"), document("x", "b", name="y")) == (["x"], ("x", "b"))
    old = document("a", name="./x", key="out_path"), document("./x", "b", name="./y", key="out_path")
    assert parsed(*old) == (["./x"], ("./x", "b"))


def test_a_tokenizer_may_be_that_of_a_stage() -> None:
    found = parsed(document("a", name="x"), document("b", "c", more="tokenizer_source: x\n"))
    assert found[0] == ["x"]


def test_the_result_keeps_the_text_of_all() -> None:
    text = "# why\n" + document("a", name="x") + "---\n" + document("x", "b")
    recipe = parse_recipe(text, "r.yml")
    assert recipe.text == text
    assert recipe.warnings == ()
    assert '"name": "x"' in recipe.stages[0].text


def test_anchors_end_with_their_document() -> None:
    with pytest.raises(RecipeError, match=r"line 4: the alias \*m stands for nothing"):
        parse_recipe("a: &m {model: a}\n---\nb:\n- *m\n", "r.yml")


def test_what_nobody_uses_is_a_warning() -> None:
    recipe = parse_recipe("---\n".join([document("a", name="x"), document("b", "c")]), "r.yml")
    assert recipe.stages == ()
    assert recipe.warnings == ("r.yml: 'x' is not used by the result; it is not merged.",)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([document("a"), document("b")], "line 5: is the second recipe without a name"),
        ([document("a", name="x"), document("b", name="x"), document("x")], "the name 'x' is there twice"),
        (
            [document("y", name="x"), document("x", name="y"), document("x", "a")],
            "recipes need each other in a circle: x -> y -> x",
        ),
        ([document("x", name="x"), document("x", "a")], "in a circle: x -> x"),
        ([document("a", name="[x]"), document("b")], "name: is a list of 1; expected a name"),
        (["a: 1\n", document("b")], "line 1: a: no such key"),
        (["[a]\n", document("b")], "is a list of 1; expected a mapping with merge_method and models"),
    ],
)
def test_refusals(documents: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("---\n".join(documents), "r.yml")
    assert str(caught.value).startswith("r.yml")
    assert words in str(caught.value)
