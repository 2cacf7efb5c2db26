"""Recipes with modules: which tensors each has, what merges them, and what cannot be told from names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tvfast
from tests.engine.checkpoints import bound, task
from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.engine.binding import Binding
from tvfast.errors import RecipeError, StateDictError

# Named as in files of models with vision; embeddings and norm of the text, two towers, and what joins them.
CONFIG = {
    "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
    "vision_config": {"num_hidden_layers": 2},
    "image_token_id": 3,
}


def names(n_text: int = 3, n_vision: int = 2) -> list[str]:
    return [
        "language_model.model.embed_tokens.weight",
        *(f"language_model.model.layers.{k}.mlp.up_proj.weight" for k in range(n_text)),
        "language_model.model.norm.weight",
        "multi_modal_projector.linear.weight",
        "vision_tower.vision_model.embeddings.weight",
        *(f"vision_tower.vision_model.encoder.layers.{k}.fc1.weight" for k in range(n_vision)),
    ]


def headers(path: str, tensors: list[str], config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint without data, every tensor [2, 2]."""
    file = f"{path}/model.safetensors"
    stored = {name: Stored(name, file, 1024 + 16 * k, 16, "F32", (2, 2)) for k, name in enumerate(tensors)}
    return Checkpoint(path, None, stored, (file,), {}, CONFIG if config is None else config, ())


def bind_modules(
    modules: str, *, tensors: list[str] | None = None, head: str = "merge_method: linear\n"
) -> Binding:
    text = f"{head}modules:\n{modules}"
    found = names() if tensors is None else tensors
    return bound(text, a=headers("a", found), b=headers("b", found))


def models(a: float | str, b: float = 1.0) -> str:
    return f"models: [{{model: a, parameters: {{weight: {a}}}}}, {{model: b, parameters: {{weight: {b}}}}}]"


THREE = (
    f"  text_decoder: {{{models(2)}}}\n"
    f"  multi_modal_projector: {{{models(3)}}}\n"
    f"  vision_tower: {{{models(4)}}}\n"
)


def weights(binding: Binding, name: str) -> Any:
    method: Any = task(binding, name).method
    return method.weights


def test_every_module_has_its_own_numbers() -> None:
    binding = bind_modules(THREE)
    assert sorted(one.name for one in binding.tasks) == sorted(names())
    for name in names():
        first = {"language_model": 2.0, "multi_modal_projector": 3.0, "vision_tower": 4.0}[name.split(".")[0]]
        assert weights(binding, name) == (first, 1.0)
    [warning] = [warning for warning in binding.warnings if "module" in warning]
    assert "modules.text_decoder: is taken to have what no other module has" in warning
    assert "under language_model." in warning


def test_a_parameter_is_looked_for_at_the_slice_then_at_the_module_then_at_the_recipe() -> None:
    binding = bind_modules(
        "  language_model:\n"
        "    {models: [{model: a, parameters: {weight: 9}}, {model: b}], parameters: {weight: 5}}\n"
        "  default: {models: [{model: a}, {model: b}]}\n",
        head="merge_method: linear\nparameters: {weight: 7}\n",
    )
    assert weights(binding, names()[0]) == (9.0, 5.0)
    assert weights(binding, names()[-1]) == (7.0, 7.0)
    assert not [warning for warning in binding.warnings if "module" in warning]


def test_gradients_run_over_the_layers_of_a_module() -> None:
    gradient = models("[0, 1]")
    binding = bind_modules(f"  vision_tower: {{{gradient}}}\n  default: {{{gradient}}}\n")
    text = [weights(binding, f"language_model.model.layers.{k}.mlp.up_proj.weight")[0] for k in range(3)]
    vision = [
        weights(binding, f"vision_tower.vision_model.encoder.layers.{k}.fc1.weight")[0] for k in range(2)
    ]
    assert (text, vision) == ([0.0, 0.5, 1.0], [0.0, 1.0])


STACKED = (
    "  text_decoder:\n"
    "    slices:\n"
    "      - sources: [{model: a, layer_range: [0, 2]}]\n"
    "      - sources: [{model: b, layer_range: [1, 3]}]\n"
    "  multi_modal_projector: {models: [{model: a}]}\n"
    "  vision_tower: {slices: [{sources: [{model: b, layer_range: [1, 2]}]}]}\n"
)


def test_layers_of_a_module_are_renumbered_and_counted_where_its_own_are() -> None:
    binding = bind_modules(STACKED, head="merge_method: passthrough\n")
    assert sorted(one.name for one in binding.tasks) == sorted(names(4, 1))
    sources = {one.name: one.inputs[0].path + ":" + one.inputs[0].name for one in binding.tasks}
    assert sources["language_model.model.layers.2.mlp.up_proj.weight"] == (
        "b/model.safetensors:language_model.model.layers.1.mlp.up_proj.weight"
    )
    assert sources["vision_tower.vision_model.encoder.layers.0.fc1.weight"] == (
        "b/model.safetensors:vision_tower.vision_model.encoder.layers.1.fc1.weight"
    )
    assert binding.config is not None
    assert binding.config["text_config"] == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert binding.config["vision_config"] == {"num_hidden_layers": 1}


def test_encoder_and_decoder_of_one_length_are_told_apart() -> None:
    tensors = [
        *(f"encoder.block.{k}.layer.0.weight" for k in range(2)),
        *(f"decoder.block.{k}.layer.0.weight" for k in range(2)),
        "shared.weight",
    ]
    config = {"num_layers": 2, "num_decoder_layers": 2}
    one = "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
    text = (
        "merge_method: passthrough\nmodules:\n"
        f"  encoder: {{models: [{{model: a}}]}}\n  decoder: {{{one}}}\n  shared: {{models: [{{model: a}}]}}\n"
    )
    binding = bound(text, a=headers("a", tensors, config))
    assert binding.config is not None
    assert (binding.config["num_layers"], binding.config["num_decoder_layers"]) == (2, 1)
    swapped = text.replace("encoder: {models: [{model: a}]}", f"encoder: {{{one}}}", 1)
    other = bound(swapped, a=headers("a", tensors, config))
    assert other.config is not None
    assert (other.config["num_layers"], other.config["num_decoder_layers"]) == (1, 1)
    vague = {"n_layer": 2, "num_layers": 2}
    with pytest.raises(RecipeError, match=r"makes 1 layers of 2.*as n_layer, num_layers"):
        bound(text, a=headers("a", tensors, vague))


def test_a_number_that_was_changed_is_not_taken_for_that_of_the_next_module() -> None:
    tensors = [
        *(f"first.block.{k}.weight" for k in range(4)),
        *(f"second.block.{k}.weight" for k in range(2)),
    ]
    text = (
        "merge_method: passthrough\nmodules:\n"
        "  first: {slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}\n"
        "  second: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}\n"
    )
    binding = bound(text, a=headers("a", tensors, {"num_layers": 4}))
    assert binding.config is not None
    assert binding.config["num_layers"] == 2


def test_one_number_does_not_count_two_modules_of_different_lengths() -> None:
    tensors = [f"{module}.block.{k}.weight" for module in ("encoder", "decoder") for k in range(2)]
    text = (
        "merge_method: passthrough\nmodules:\n"
        "  encoder: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}\n"
        "  decoder: {slices: [{sources: [{model: a, layer_range: [0, %d]}]}]}\n"
    )
    checkpoint = headers("a", tensors, {"num_layers": 2})
    with pytest.raises(RecipeError, match=r"modules\.decoder: makes 2 layers and another 1, and"):
        bound(text % 2, a=checkpoint)
    binding = bound(text % 1, a=checkpoint)
    assert binding.config is not None
    assert binding.config["num_layers"] == 1


QWEN = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "lm_head.weight",
    "visual.merger.mlp.weight",
    "visual.blocks.0.mlp.weight",
    "visual.patch_embed.weight",
]


def test_beginnings_of_names_may_be_told() -> None:
    told = (
        "merge_method: linear\n"
        "tvfast: {modules: {vision_tower: visual, multi_modal_projector: [visual.merger.]}}\n"
    )
    binding = bind_modules(THREE, tensors=QWEN, head=told)
    assert [weights(binding, name)[0] for name in QWEN] == [2.0, 2.0, 2.0, 3.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("modules", "tensors", "told", "expected"),
    [
        (THREE, QWEN, "", "modules.text_decoder: no tensor of a tells by its name which of text_decoder and"),
        (
            THREE,
            QWEN,
            "vision_tower: visual",
            "which of text_decoder and multi_modal_projector it",
        ),
        (THREE, names(), "text_decoder: vision_tower", "has the tensors under vision_tower. that 'text_deco"),
        (THREE, names(), "text_decoder: elsewhere", "in no module; expected every tensor in one"),
        (
            f"  vision_tower: {{{models(1)}}}\n",
            names(),
            "",
            "6 tensors (language_model.model.embed_tokens.weight, ",
        ),
        (
            f"  decoder: {{{models(1)}}}\n  default: {{{models(1)}}}\n",
            ["x.decoder.a", "y.decoder.a", "z"],
            "",
            "a has tensors under x.decoder., y.decoder.; expected one beginning",
        ),
        (
            f"  x: {{{models(1)}}}\n  default: {{{models(1)}}}\n",
            ["x.a", "x.b"],
            "",
            "modules.default: a has no tensor of it",
        ),
    ],
)
def test_what_names_do_not_tell_is_an_error(
    modules: str, tensors: list[str], told: str, expected: str
) -> None:
    head = f"merge_method: linear\ntvfast: {{modules: {{{told}}}}}\n" if told else "merge_method: linear\n"
    with pytest.raises(RecipeError) as caught:
        bind_modules(modules, tensors=tensors, head=head)
    assert expected in str(caught.value)
    assert "tvfast: {modules: {" in str(caught.value)


def test_models_of_other_tensors_in_a_module_are_refused() -> None:
    text = f"merge_method: linear\nmodules:\n{THREE}"
    with pytest.raises(StateDictError, match=r"modules.vision_tower.models\[1\] \(b\)"):
        bound(text, a=headers("a", names()), b=headers("b", names(3, 1)))


def test_the_stack_of_a_module_must_be_one() -> None:
    tensors = ["x.blocks.0.weight", "x.lists.0.weight", "y.weight"]
    text = (
        "merge_method: passthrough\nmodules:\n"
        "  x: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}\n  y: {models: [{model: a}]}\n"
    )
    with pytest.raises(RecipeError, match=r"modules\.x\.slices: cannot tell which tensors of a are its"):
        bound(text, a=headers("a", tensors, {}))


def test_modules_are_merged_as_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for path in ("a", "b"):
        (tmp_path / path).mkdir()
        tensors = {name: torch.randn(4, 4, generator=generator) for name in names()}
        save_file(tensors, tmp_path / path / "model.safetensors")
        (tmp_path / path / "config.json").write_text(json.dumps(CONFIG))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": a,
        "modules": {
            "text_decoder": {"models": [{"model": b, "parameters": {"weight": 0.5}}]},
            "multi_modal_projector": {"models": [{"model": a}]},
            "vision_tower": {"models": [{"model": b}], "parameters": {"weight": 0.25}},
        },
    }
    tvfast.merge_checkpoints(recipe, tmp_path / "out", threads=1)
    base, other = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(merged) == sorted(names())
    shares = {"language_model": 0.5, "multi_modal_projector": 0.0, "vision_tower": 0.25}
    for name, tensor in merged.items():
        share = shares[name.split(".")[0]]
        expected = base[name].double() + share * (other[name].double() - base[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
