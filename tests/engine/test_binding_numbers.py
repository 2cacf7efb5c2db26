"""Which numbers each tensor is merged with. They were read off merges of mergekit 0.1.5.

For these, model k of a family of five layers held 1 at element k of every tensor and 0 elsewhere, so that an
unnormalised linear merge shows every weight.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.checkpoints import bound, checkpoint, task
from tvfast.engine.binding import Binding
from tvfast.engine.tasks import Task
from tvfast.errors import RecipeError

LINEAR = "merge_method: linear\nparameters: {normalize: false}\n"


def method(binding: Binding, name: str) -> Any:
    return task(binding, name).method


def along(binding: Binding, attribute: str, suffix: str = "input_layernorm.weight") -> list[Any]:
    """An attribute of the methods: embedding, five layers, final norm, head."""
    layers = [f"model.layers.{k}.{suffix}" for k in range(5)]
    every = ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]
    return [getattr(method(binding, name), attribute) for name in every]


# -- numbers along the layers and by name -----------------------------------------------------------------


def test_gradients_run_over_the_layers_and_the_rest_has_the_first_value() -> None:
    found = bound(
        LINEAR
        + "models:\n  - {model: a, parameters: {weight: [0, 1]}}\n"
        + "  - {model: b, parameters: {weight: [1, 2, 10]}}"
    )
    expected = [(0, 1), (0, 1), (0.25, 1.5), (0.5, 2), (0.75, 6), (1, 10), (0, 1), (0, 1)]
    assert along(found, "weights") == expected


def test_filters_choose_by_name() -> None:
    found = bound(
        LINEAR
        + """models:
  - model: a
    parameters:
      weight: [{filter: layernorm, value: [0, 4]}, {filter: lm_head, value: 7}, {filter: '*', value: 5}]
  - model: b
    parameters: {weight: [{filter: layers.1., value: 1}, {value: 9}]}
"""
    )
    assert along(found, "weights") == [(5, 9), (0, 9), (1, 1), (2, 9), (3, 9), (4, 9), (5, 9), (7, 9)]
    projections = along(found, "weights", "mlp.up_proj.weight")[1:6]
    assert projections == [(5, 9), (5, 1), (5, 9), (5, 9), (5, 9)]


def test_a_level_without_a_filter_that_fits_is_passed_over() -> None:
    found = bound(
        """merge_method: linear
parameters: {normalize: false, weight: [{filter: up_proj, value: 20}, {value: [30, 40]}]}
models:
  - {model: a, parameters: {weight: [{filter: layernorm, value: [0, 4]}]}}
  - {model: b}
"""
    )
    expected = [(30, 30), (0, 30), (1, 32.5), (2, 35), (3, 37.5), (4, 40), (30, 30), (30, 30)]
    assert along(found, "weights") == expected
    assert along(found, "weights", "mlp.up_proj.weight")[1:6] == [(20, 20)] * 5


def test_a_tensor_without_a_required_number_is_an_error() -> None:
    with pytest.raises(RecipeError) as caught:
        bound(LINEAR + "models: [{model: a, parameters: {weight: [{filter: layernorm, value: 1}]}}]")
    assert "models[0] (a): weight has no value for tensor 'lm_head.weight': no filter fits" in str(
        caught.value
    )


def test_numbers_of_the_tensor_filter_on_its_name_and_fall_back_to_the_default() -> None:
    found = bound(
        """merge_method: task_arithmetic
base_model: o
parameters: {weight: 4, lambda: [{filter: layers.0, value: 3}]}
models: [{model: a}, {model: b, parameters: {weight: 10}}]
"""
    )
    assert along(found, "scale") == [1, 3, 1, 1, 1, 1, 1, 1]
    assert set(along(found, "weights")) == {(4, 10)}


def test_slerp_by_filter_and_layer() -> None:
    found = bound(
        """merge_method: slerp
base_model: b
models: [{model: a}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
"""
    )
    assert along(found, "t", "self_attn.q_proj.weight") == [0.5, 0, 0.5, 0.3, 0.7, 1, 0.5, 0.5]
    assert along(found, "t", "mlp.down_proj.weight") == [0.5, 1, 0.5, 0.7, 0.3, 0, 0.5, 0.5]
    norm = task(found, "model.norm.weight")
    assert norm.base is not None
    assert (norm.base.path, [stored.path for stored in norm.models]) == (
        "b/model.safetensors",
        ["a/model.safetensors"],
    )


# -- slices -----------------------------------------------------------------------------------------------

THREE_SLICES = """merge_method: linear
parameters: {normalize: false}
slices:
  - sources:
      - {model: a, layer_range: [1, 3], parameters: {weight: [1, 5]}}
      - {model: b, layer_range: [3, 5], parameters: {weight: 10}}
  - sources:
      - {model: c, layer_range: [0, 3], parameters: {weight: [100, 300]}}
      - {model: short, layer_range: [0, 3], parameters: {weight: [2, 3]}}
  - sources:
      - {model: c, layer_range: [2, 3], parameters: {weight: [7, 9]}}
"""


def origins(found: Task) -> list[str]:
    return [f"{stored.path.split('/')[0]}:{stored.name}" for stored in found.models]


def test_slices_stack_layers_and_start_gradients_anew() -> None:
    """A slice of one layer has the last value; embeddings are the first slice's, norm and head the last's."""
    found = bound(THREE_SLICES, short=checkpoint("short", 3))
    weights = {
        found.name.removeprefix("model.").removesuffix(".input_layernorm.weight"): found.method.weights
        for found in found.tasks
        if found.method is not None and "proj" not in found.name
    }
    assert weights == {
        "embed_tokens.weight": (1, 10),
        "layers.0": (1, 10),
        "layers.1": (5, 10),
        "layers.2": (100, 2),
        "layers.3": (200, 2.5),
        "layers.4": (300, 3),
        "layers.5": (9,),
        "norm.weight": (7,),
        "lm_head.weight": (7,),
    }
    assert origins(task(found, "model.layers.1.mlp.up_proj.weight")) == [
        "a:model.layers.2.mlp.up_proj.weight",
        "b:model.layers.4.mlp.up_proj.weight",
    ]
    assert origins(task(found, "lm_head.weight")) == ["c:lm_head.weight"]
    assert found.config is not None
    assert found.config["num_hidden_layers"] == 6


def test_slices_come_out_in_the_order_of_layers() -> None:
    found = bound(THREE_SLICES, short=checkpoint("short", 3))
    assert found.tasks[0].name == "model.embed_tokens.weight"
    layers = [int(one.name.split(".")[2]) for one in found.tasks if ".layers." in one.name]
    assert layers == sorted(layers)
    assert {one.name for one in found.tasks[-2:]} == {"model.norm.weight", "lm_head.weight"}


def test_own_numbers_win_over_the_slice_and_those_over_the_recipe() -> None:
    found = bound(
        """merge_method: linear
parameters: {normalize: false, weight: [1000, 2000]}
slices:
  - parameters: {weight: [1, 5]}
    sources:
      - {model: a, layer_range: [1, 3]}
      - {model: b, layer_range: [3, 5], parameters: {weight: 10}}
  - sources:
      - {model: c, layer_range: [0, 3]}
      - {model: a, layer_range: [0, 3], parameters: {weight: [2, 3]}}
"""
    )
    expected = [(1, 10), (1, 10), (5, 10), (1000, 2), (1500, 2.5), (2000, 3), (1000, 2), (1000, 2)]
    assert along(found, "weights") == expected


def test_numbers_of_models_filter_on_names_in_the_inputs() -> None:
    found = bound(
        """merge_method: linear
parameters:
  normalize: [{filter: layers.1., value: false}]
  weight: [{filter: layers.1., value: 51}, {filter: layers.2., value: 52}, {value: 99}]
slices:
  - parameters: {weight: [{filter: layers.1., value: 11}, {filter: layers.4., value: 14}]}
    sources:
      - {model: a, layer_range: [1, 3]}
      - {model: b, layer_range: [3, 5], parameters: {weight: [{filter: layers.3., value: 3}]}}
"""
    )
    assert method(found, "model.layers.0.input_layernorm.weight").weights == (11, 3)
    assert method(found, "model.layers.1.input_layernorm.weight").weights == (52, 14)
    assert method(found, "model.norm.weight").weights == (99, 99)
    # what is one for all models filters on the name in the output
    assert method(found, "model.layers.0.input_layernorm.weight").normalize is True
    assert method(found, "model.layers.1.input_layernorm.weight").normalize is False


def test_numbers_of_a_slice_hold_outside_of_its_layers() -> None:
    found = bound(
        """merge_method: linear
parameters: {weight: 3, normalize: [true, true]}
slices:
  - sources: [{model: a, layer_range: [1, 3]}]
  - parameters: {normalize: [false, true, true]}
    sources: [{model: b, layer_range: [2, 5]}]
  - parameters: {normalize: false}
    sources: [{model: b, layer_range: [2, 3]}]
"""
    )
    layers = [method(found, f"model.layers.{k}.input_layernorm.weight").normalize for k in range(6)]
    assert layers == [True, True, False, True, True, False]
    assert method(found, "model.embed_tokens.weight").normalize is True
    assert method(found, "lm_head.weight").normalize is False


def test_every_slice_has_its_base() -> None:
    found = bound(
        """merge_method: task_arithmetic
base_model: o
parameters: {weight: 1}
slices:
  - base_model: c
    sources: [{model: a, layer_range: [1, 3]}, {model: c, layer_range: [2, 4]}]
  - sources: [{model: a, layer_range: [1, 3]}, {model: o, layer_range: [2, 4]}]
"""
    )
    bases = [task(found, f"model.layers.{k}.mlp.up_proj.weight").base for k in range(4)]
    assert [base and (base.path[0], base.name[13]) for base in bases] == [
        ("c", "2"),
        ("c", "3"),
        ("o", "2"),
        ("o", "3"),
    ]
    outside = [task(found, name).base for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert [base and base.path[0] for base in outside] == ["c", "o"]


def test_lists_of_layers_in_the_configuration_follow_the_layers() -> None:
    kinds = {"layer_types": ["full", "slide", "full", "slide", "full"], "eos_token_id": [1, 2, 3, 4, 5]}
    found = bound(
        """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
""",
        a=checkpoint("a", config=kinds),
        b=checkpoint("b", config={"layer_types": list("vwxyz")}),
    )
    assert found.config is not None
    assert found.config["layer_types"] == ["full", "slide", "w"]
    assert found.config["eos_token_id"] == [1, 2, 3, 4, 5]


def test_the_number_of_layers_may_be_in_a_nested_configuration() -> None:
    nested = {
        "num_hidden_layers": None,
        "text_config": {"num_hidden_layers": 5},
        "vision_config": {"depth": 2},
    }
    vision = {f"visual.blocks.{k}.w": ("F32", (4,)) for k in range(2)}
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]"
    found = bound(text, a=checkpoint("a", config=nested, tensors=vision))
    assert found.config is not None
    assert found.config["text_config"] == {"num_hidden_layers": 2}
    assert {one.name for one in found.tasks if one.name.startswith("visual")} == set(vision)


@pytest.mark.parametrize(
    ("layers", "n", "words"),
    [
        ("[3, 7]", 5, "slices[0].sources[0].layer_range: is [3, 7], but a has 5 layers from model.layers.0"),
        (
            "[0, 1]",
            4,
            "cannot tell which tensors of a are its layers. Found: 5 of model.layers.*; expected one stack",
        ),
    ],
)
def test_layers_that_are_not_there(layers: str, n: int, words: str) -> None:
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {layers}}}]}}]"
    with pytest.raises(RecipeError) as caught:
        bound(text, a=checkpoint("a", config={"num_hidden_layers": n}))
    assert words in str(caught.value)


def test_two_stacks_of_one_length_are_ambiguous() -> None:
    twin = {f"encoder.layers.{k}.w": ("F32", (4,)) for k in range(5)}
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
    with pytest.raises(RecipeError, match=r"Found: 5 of model\.layers\.\*, 5 of encoder\.layers\.\*"):
        bound(text, a=checkpoint("a", tensors=twin))
