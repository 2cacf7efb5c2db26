"""What a recipe may say. Behaviour that follows mergekit was checked against mergekit 0.1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tvfast.errors import RecipeError, UnknownNameError
from tvfast.methods import METHODS
from tvfast.recipe import Recipe, Resolver, load_recipe, parse_recipe
from tvfast.recipe.keys import PEER_KEYS, method_keys

LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
MODULES = (
    "merge_method: linear\nparameters: {weight: 1}\nmodules: {text: {models: [{model: a}, {model: b}]}}\n"
)
TIES = "merge_method: ties\nbase_model: o\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"


def parse(text: str) -> Recipe:
    return parse_recipe(text, "r.yml")


def refused(text: str) -> str:
    with pytest.raises((RecipeError, UnknownNameError)) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith("r.yml"), message
    return message


def inputs(recipe: Recipe, part: int = 0) -> list[str]:
    return [source.model for source in recipe.slices[part].sources]


# -- the whole --------------------------------------------------------------------------------------------


def test_everything_of_a_recipe() -> None:
    recipe = parse(
        """merge_method: ties
base_model: o
models:
  - {model: a, parameters: {weight: 0.5, density: [1, 0.1]}}
  - {model: b}
parameters: {weight: 1, normalize: false, lambda: 0.9}
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: union
chat_template: auto
tvfast: {seed: 7, tie: index, dialect: peft, out_shard_size: 2GB, nonfinite: propagate, on_missing: base}
"""
    )
    assert (recipe.method, recipe.dialect, recipe.base_model, recipe.donor) == ("ties", "peft", "o", "o")
    assert recipe.model_paths() == ("o", "a", "b")
    assert (recipe.dtype, recipe.out_dtype, recipe.output_dtype) == ("F32", "BF16", "BF16")
    assert recipe.tokenizer is not None
    assert (recipe.tokenizer.source, recipe.chat_template) == ("union", "auto")
    assert (recipe.seed, recipe.tie, recipe.shard_bytes) == (7, "index", 2_000_000_000)
    assert (recipe.nonfinite, recipe.on_missing, recipe.warnings) == ("propagate", "base", ())
    assert not recipe.stacked
    assert inputs(recipe) == ["a", "b", "o"]


def test_scope_is_of_ties_only() -> None:
    recipe = parse(TIES + "tvfast: {scope: model}\n")
    assert recipe.scope == "model"
    assert Resolver(recipe, 0).method(recipe.slices[0], ["w"] * 3, "w", 0.0).whole_model
    assert "'ties'" in refused(LINEAR + "tvfast: {scope: model}\n")
    assert "one of tensor, model" in refused(TIES + "tvfast: {scope: layer}\n")


def test_defaults() -> None:
    recipe = parse(LINEAR)
    assert (recipe.base_model, recipe.donor, recipe.output_dtype) == (None, "a", None)
    assert (recipe.dialect, recipe.seed, recipe.tie, recipe.shard_bytes) == (
        "mergekit",
        0,
        None,
        5_000_000_000,
    )
    assert (recipe.nonfinite, recipe.on_missing, recipe.tokenizer) == ("error", "error", None)


def test_the_text_is_kept(tmp_path: Path) -> None:
    text = "\ufeff# a comment\r\n" + LINEAR
    path = tmp_path / "r.yml"
    path.write_bytes(text.encode())
    assert load_recipe(path).text == text
    assert load_recipe(str(path)).where == str(path)


def test_a_mapping_is_a_recipe_and_its_text_another() -> None:
    source = {"merge_method": "linear", "models": [{"model": Path("a"), "parameters": {"weight": 0.1}}]}
    recipe = load_recipe(source)
    assert inputs(recipe) == ["a"]
    again = parse_recipe(recipe.text, "recipe")
    assert again.slices == recipe.slices


def test_empty_keys_count_as_absent() -> None:
    text = LINEAR + "slices:\nbase_model: ~\ndtype: null\ntokenizer:\ntvfast:\nout_shard_size:\n"
    assert parse(text).slices == parse(LINEAR).slices


# -- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: a}]", "has no merge_method; expected one of"),
        ("merge_method:\nmodels: [{model: a}]", "has no merge_method"),
        ("merge_method: 3", "merge_method: is 3; expected the name of a method"),
        ("merge_method: tis", "method 'tis' does not exist; did you mean 'ties'?"),
        ("merge_method: Linear", "did you mean 'linear'?"),
        ("merge_method: nuslerpp", "did you mean 'nuslerp'?"),
        (LINEAR + "modelz: []", "line 4: modelz: no such key. Did you mean 'models'?"),
        (LINEAR + "density: 1", "density: belongs under parameters"),
        (LINEAR + "modules: {text: {models: []}}", "has modules and models or slices besides"),
        ("merge_method: linear\nmodules: {}", "modules: is an empty mapping; expected one module at least"),
        ("merge_method: linear\nmodules: [a]", "modules: is a list of 1; expected a mapping from modules"),
        ("merge_method: linear\nmodules: {text: {}}", "modules.text: has neither models nor slices"),
        ("merge_method: linear\nmodules: {text: {model: []}}", "no such key. Did you mean 'models'?"),
        (MODULES + "tvfast: {modules: {txt: a}}", "'txt' is no module of this recipe. Did you mean 'text'?"),
        (MODULES + "tvfast: {modules: {text: 3}}", "tvfast.modules.text: is 3; expected the beginning of"),
        (MODULES + "tvfast: {modules: {text: []}}", "tvfast.modules.text: is an empty list; expected the"),
        (LINEAR + "tvfast: {modules: {text: a}}", "tvfast.modules: belongs to recipes with modules"),
        (LINEAR + "slices: [{sources: []}]", "has both models and slices"),
        ("merge_method: linear", "has neither models nor slices"),
        ("merge_method: linear\nmodels: []", "models: is an empty list"),
        ("merge_method: linear\nmodels: a", "models: is 'a'; expected a list of models"),
        ("merge_method: linear\nmodels: [a]", "models[0]: is 'a'; expected a mapping with model"),
        ("merge_method: linear\nmodels: [{}]", "models[0]: has no model"),
        (
            "merge_method: linear\nmodels: [{model: a, layer_range: [0, 1]}]",
            "models[0].layer_range: no such key",
        ),
        (LINEAR + "dtype: float64", "dtype: is 'float64'; expected one of float32, bfloat16, float16"),
        (LINEAR + "dtype: 16", "dtype: is 16; expected one of"),
        (LINEAR + "out_dtype: bf16", "out_dtype: is 'bf16'"),
        (LINEAR + "chat_template: [a]", "chat_template: is a list of 1; expected auto or a Jinja template"),
        (LINEAR + "chat_template: chatml", "chat_template: is 'chatml'; expected auto or a Jinja template"),
        (LINEAR + "tvfast: {sed: 1}", "tvfast.sed: no such key. Did you mean 'seed'?"),
        (LINEAR + "tvfast: {seed: 1.5}", "tvfast.seed: is 1.5; expected an integer"),
        (LINEAR + "tvfast: {seed: true}", "tvfast.seed: is true; expected an integer"),
        (LINEAR + "tvfast: {tie: last}", "tvfast.tie: is 'last'; expected one of ge, index, hash"),
        (
            LINEAR + "tvfast: {dialect: paper}",
            "method 'linear' has no dialect 'paper'; expected one of mergekit",
        ),
        (LINEAR + "tvfast: {nonfinite: no}", "tvfast.nonfinite: is false; expected one of error, propagate"),
        (LINEAR + "tvfast: {on_missing: skip}", "tvfast.on_missing: is 'skip'; expected one of error, base"),
        (
            LINEAR + "tvfast: {out_shard_size: 1B}\nout_shard_size: 1B",
            "there is an out_shard_size outside of tvfast",
        ),
        (LINEAR + "tokenizer: {source: base}\ntokenizer_source: base", "there is a tokenizer_source too"),
        (LINEAR + "tokenizer: union", "tokenizer: is 'union'; expected a mapping"),
        (LINEAR + "tokenizer_source: 3", "tokenizer_source: is 3; expected a model"),
    ],
)
def test_refused_keys(text: str, words: str) -> None:
    assert words in refused(text)


def test_a_template_is_taken_as_it_is() -> None:
    assert parse(LINEAR + "chat_template: '{{ messages }}'").chat_template == "{{ messages }}"


def test_lines_of_errors_are_those_of_the_keys() -> None:
    text = "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight:\n        - x\n"
    assert refused(text).startswith("r.yml, line 6: models[0].parameters.weight[0]: is 'x'")
    assert refused(text.replace("- x", "x: 1")).startswith(
        "r.yml, line 6: models[0].parameters.weight.x: no such"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer: {source: {model: {path: c}}}", "c"),
        ("tokenizer: {source: union, tokens: {}, pad_to_multiple_of: null}", "union"),
        ("tokenizer_source: b", "b"),
    ],
)
def test_tokenizer_sources(text: str, expected: str) -> None:
    found = parse(LINEAR + text).tokenizer
    assert found is not None
    assert (found.source, found.rules, found.multiple) == (expected, (), 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5B", 5 * 10**9),
        ("5 b", 5 * 10**9),
        ("500M", 500 * 10**6),
        ("10k", 10**4),
        ("123", 123),
        ("'123'", 123),
        ("2GB", 2 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("1MiB", 2**20),
        ("300KB", 300_000),
        ("2.0", 2),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse(LINEAR + f"out_shard_size: {text}").shard_bytes == expected


@pytest.mark.parametrize(
    "text", ["0", "-1", "-1B", "1X", "B", "1.5", "1e99", ".inf", "true", "[1]", f"{'9' * 18}T"]
)
def test_refused_sizes(text: str) -> None:
    assert "out_shard_size: is" in refused(LINEAR + f"out_shard_size: {text}")


# -- references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("some/where", "some/where"),
        ("org/name@main", "org/name@main"),
        ("{model: a+b}", "a+b"),
        ("{model: {path: a+b}}", "a+b"),
        ("{model: {path: org/name, revision: v2}}", "org/name@v2"),
        ("{model: {path: a, revision: null}, lora: null, override_architecture: null}", "a"),
    ],
)
def test_references(text: str, expected: str) -> None:
    recipe = parse(f"merge_method: linear\nmodels: [{{model: {text}, parameters: {{weight: 1}}}}]")
    assert inputs(recipe) == [expected]
    assert recipe.warnings == ()


@pytest.mark.parametrize(
    ("text", "base", "adapter"),
    [
        ("a+b", "a", "b"),
        ("org/name@v1+./lora", "org/name@v1", "./lora"),
        ("{model: a, lora: b}", "a", "b"),
        ("{model: {path: a, revision: r}, lora: {path: b, revision: s}}", "a@r", "b@s"),
        ("{model: {path: a+b}, lora: {path: c+d}}", "a+b", "c+d"),
    ],
)
def test_references_to_adapters(text: str, base: str, adapter: str) -> None:
    recipe = parse(f"merge_method: linear\nmodels: [{{model: {text}, parameters: {{weight: 1}}}}]")
    assert inputs(recipe) == [f"{base}+{adapter}"]
    assert recipe.parts_of(f"{base}+{adapter}") == (base, adapter)
    assert recipe.parts_of("other") == ("other", None)


def test_one_name_for_a_path_and_an_adapter_is_refused() -> None:
    with pytest.raises(RecipeError, match="rename one"):
        parse(
            "merge_method: linear\n"
            "models: [{model: a+b, parameters: {weight: 1}}, "
            "{model: {model: {path: a+b}}, parameters: {weight: 1}}]"
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a+", "'a+' is no base+adapter"),
        ("+b", "'+b' is no base+adapter; expected one '+' between two paths"),
        ("a+b+c", "'a+b+c' is no base+adapter; expected one '+' between two paths"),
        ("{model: a, lora: {revision: b}}", "model.lora: has no path"),
        ("{model: a, lora: 3}", "model.lora: is 3; expected an adapter"),
        ("3", "model: is 3; expected a model"),
        ("''", "model: is ''; expected a model"),
        ("null", "model: is empty (null); expected a model"),
        ("{path: a}", "model.path: no such key"),
        ("{lora: null}", "has no model"),
        ("{model: {revision: a}}", "has no path"),
    ],
)
def test_refused_references(text: str, words: str) -> None:
    assert words in refused(f"merge_method: linear\nmodels: [{{model: {text}}}]")


def test_an_architecture_is_ignored() -> None:
    text = "{model: {path: a}, override_architecture: LlamaForCausalLM}"
    recipe = parse(f"merge_method: linear\nmodels: [{{model: {text}, parameters: {{weight: 1}}}}]")
    assert len(recipe.warnings) == 1
    assert "'override_architecture' has no effect" in recipe.warnings[0]


# -- parameters -------------------------------------------------------------------------------------------


def test_unknown_parameters_are_errors() -> None:
    message = refused(LINEAR.replace("weight: 1", "wieght: 1"))
    assert "parameters.wieght: no such parameter. Did you mean 'weight'? Method 'linear' takes" in message
    assert "no such parameter" in refused(TIES.replace("model: a", "model: a, parameters: {dens: 1}"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (TIES.replace("weight: 1", "weight: 1, int8_mask: true"), "int8_mask"),
        (TIES.replace("weight: 1", "weight: 1, t: 0.5"), "t"),
        (LINEAR.replace("weight: 1", "weight: 1, lambda: 2"), "lambda"),
        (LINEAR.replace("model: a", "model: a, parameters: {normalize: false}"), "normalize"),
        (LINEAR.replace("model: a", "model: a, parameters: {density: x}"), "density"),
        ("merge_method: sce\nbase_model: o\nmodels: [{model: a, parameters: {weight: 2}}]", "weight"),
        (TIES.replace("{model: b}", "{model: o, parameters: {weight: 2}}"), "weight"),
        (LINEAR + "name: first", "name"),
    ],
)
def test_parameters_without_effect_are_one_warning(text: str, key: str) -> None:
    recipe = parse(text)
    assert len(recipe.warnings) == 1
    assert f"'{key}'" in recipe.warnings[0]
    assert "ignored" in recipe.warnings[0]


def test_our_names_are_told_apart_from_those_of_recipes() -> None:
    (warning,) = parse(TIES.replace("weight: 1", "weight: 1, scale: 2")).warnings
    assert "'scale' has no effect with 'ties', whose 'scale' is 'lambda' in a recipe" in warning


def test_the_nearest_name_in_any_case() -> None:
    assert "did you mean 'ties'?" in refused(TIES.replace("merge_method: ties", "merge_method: TIES"))
    assert "Did you mean 'weight'?" in refused(TIES.replace("weight: 1", "Weight: 1"))


def test_one_warning_however_often() -> None:
    text = "merge_method: ties\nbase_model: o\nparameters: {weight: 1, int8_mask: 1}\nmodels:\n"
    text += "".join(f"  - {{model: m{k}, parameters: {{int8_mask: 1}}}}\n" for k in range(5))
    assert len(parse(text).warnings) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            TIES.replace("weight: 1", "weight: 1, density: [0.5, 1.5]"),
            "parameters.density: method 'ties': density is 1.5",
        ),
        (LINEAR.replace("weight: 1", "weight: 1e40"), "parameters.weight: method 'linear': weights is 1e+40"),
        (LINEAR.replace("weight: 1", "weight: 0"), "models: method 'linear': the weights sum to 0"),
        (
            "merge_method: della\nbase_model: o\nmodels: [{model: a, parameters: {weight: 1, density: 0.9}}]",
            "models: method 'della': density 0.9 with epsilon 0.15",
        ),
    ],
)
def test_numbers_that_the_method_does_not_take(text: str, words: str) -> None:
    assert words in refused(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
            "models[1] (b): has no weight",
        ),
        ("merge_method: ties\nbase_model: o\nmodels: [{model: a}]", "models[0] (a): has no weight"),
        (
            "merge_method: slerp\nbase_model: o\nmodels: [{model: a, parameters: {t: 1}}]",
            "parameters: has no t",
        ),
        (
            "merge_method: linear\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]",
            "models[0] (a): has no weight",
        ),
    ],
)
def test_required_parameters(text: str, words: str) -> None:
    assert words in refused(text)


def test_what_needs_no_weight() -> None:
    assert parse("merge_method: sce\nbase_model: o\nmodels: [{model: a}]").warnings == ()
    assert parse("merge_method: passthrough\nmodels: [{model: a}]").warnings == ()
    assert (
        parse("merge_method: ties\nbase_model: o\nmodels: [{model: a}]\ntvfast: {dialect: paper}").warnings
        == ()
    )
    assert parse(TIES.replace("{model: b}", "{model: o}")).warnings == ()


OURS = {  # the peer has not
    *("select_in_merge", "threshold", "shrink", "ridge", "iterations", "tolerance", "preconditioned"),
    *("ftol", "common_space_fraction", "smallest", "agree", "ratio", "outliers", "sigma"),
}
OF_ALL = {("ram", "epsilon"), ("ramplus_tl", "epsilon"), ("knots", "density")}  # elsewhere of every model


def test_every_parameter_of_every_method_has_a_name_in_recipes() -> None:
    for name in METHODS:
        for dialect in METHODS[name].dialects:
            for key in method_keys(name, dialect).values():
                assert key.name in PEER_KEYS | OURS, (name, key)
                per_model = key.name in ("weight", "density", "gamma", "epsilon", "scale", "threshold")
                assert key.per_model == (per_model and (name, key.name) not in OF_ALL)


def method_of(text: str) -> Any:
    recipe = parse(text)
    part = recipe.slices[0]
    return Resolver(recipe, recipe.seed).method(part, ["n"] * len(part.sources), "n", 0.0)


def test_names_in_recipes_and_in_methods() -> None:
    ties = method_of(
        """merge_method: ties
base_model: o
parameters: {lambda: 0.5, normalize: off}
tvfast: {seed: 3, tie: ge}
models:
  - {model: a, parameters: {weight: 2, density: 0.5}}
  - {model: o}
  - {model: b, parameters: {weight: 3}}
"""
    )
    assert (ties.weights, ties.density, ties.scale, ties.normalize) == ((2.0, 3.0), (0.5, 1.0), 0.5, False)
    assert (ties.seed, ties.tie, ties.dialect) == (3, "ge", "mergekit")
    copied = method_of("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 3}}]")
    assert (copied.weights, copied.scale) == (3.0, 1.0)
    assert method_of("merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: 2}").weights == 2.0


# -- slices -----------------------------------------------------------------------------------------------

STACK = """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources: [{model: b, layer_range: ["20", 40.0]}]
"""


def test_slices() -> None:
    recipe = parse(STACK)
    assert recipe.stacked
    assert [part.n_layers for part in recipe.slices] == [24, 20]
    assert recipe.slices[1].sources[0].layers == (20, 40)
    assert recipe.model_paths() == ("a", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STACK.replace("[0, 24]", "[24, 0]"), "layer_range: is [24, 0]; expected 0 <= first < last"),
        (STACK.replace("[0, 24]", "[2, 2]"), "expected 0 <= first < last"),
        (STACK.replace("[0, 24]", "[-2, 1]"), "expected 0 <= first < last"),
        (STACK.replace("[0, 24]", "[0, 1, 2]"), "layer_range: is a list of 3"),
        (STACK.replace("[0, 24]", "24"), "layer_range: is 24"),
        (STACK.replace("[0, 24]", "[0, 1.5]"), "layer_range[1]: is 1.5; expected an integer"),
        (STACK.replace(", layer_range: [0, 24]", ""), "slices[0].sources[0]: has no layer_range"),
        (STACK + "  - {parameters: {scale: 1}}", "slices[2]: has no sources"),
        (STACK + "  - {sources: []}", "slices[2].sources: is an empty list"),
        (STACK + "  - {source: []}", "slices[2].source: no such key. Did you mean 'sources'?"),
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
            "slices[0].sources: ranges of different lengths, a: 2, b: 3",
        ),
        (
            "merge_method: ties\nbase_model: o\nparameters: {weight: 1}\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 2]}]",
            "slices[0]: the base 'o' is not among the sources",
        ),
    ],
)
def test_refused_slices(text: str, words: str) -> None:
    assert words in refused(text)


def test_a_slice_may_have_its_own_base() -> None:
    recipe = parse(
        """merge_method: ties
base_model: o
parameters: {weight: 1}
slices:
  - base_model: b
    sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: o, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
"""
    )
    assert [part.base for part in recipe.slices] == [1, 0]
    assert recipe.model_paths() == ("o", "a", "b")
