"""From recipe and headers to tasks: operands, types, tensors that do not pair, tied tensors."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.checkpoints import bound, checkpoint, task
from tvfast.errors import DTypeError, ShapeError, StateDictError

TWO = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
TIES = "merge_method: ties\nbase_model: o\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
COPY = "merge_method: passthrough\nmodels: [{model: a}]\n"


# -- what is an operand -----------------------------------------------------------------------------------


def test_the_base_is_no_operand_of_task_vectors_wherever_it_is_listed() -> None:
    models = "{model: a, parameters: {weight: 2}}, {model: o}, {model: b, parameters: {weight: 3}}"
    text = f"merge_method: ties\nbase_model: o\nmodels: [{models}]"
    one = bound(text).tasks[0]
    assert one.base is not None
    assert one.base.path == "o/model.safetensors"
    assert [stored.path[0] for stored in one.models] == ["a", "b"]
    assert one.method is not None
    assert one.method.weights == (2, 3)


def test_an_unlisted_base_of_linear_is_read_for_its_configuration_only() -> None:
    text = "merge_method: linear\nbase_model: o\nmodels: [{model: a, parameters: {weight: 1}}]"
    found = bound(text, o=checkpoint("o", 3, config={"from": "o"}))
    assert all(one.base is None and len(one.models) == 1 for one in found.tasks)
    assert found.donor == "o"
    assert found.config is not None
    assert found.config["from"] == "o"


def test_the_base_alone_is_copied() -> None:
    found = bound("merge_method: ties\nbase_model: o\nmodels: [{model: o}]")
    assert all(one.method is None and len(one.models) == 1 for one in found.tasks)


def test_order_and_keys_are_those_of_the_base() -> None:
    base = checkpoint("o", tensors={"first": ("F32", (2,))})
    others = {name: checkpoint(name, tensors={"first": ("F32", (2,))}) for name in "ab"}
    reversed_a = checkpoint("a", tensors={"first": ("F32", (2,))})
    tensors = dict(reversed(reversed_a.tensors.items()))
    others["a"] = type(reversed_a)("a", None, tensors, reversed_a.files, {}, {}, ())
    found = bound(TIES, o=base, **others)
    assert [one.name for one in found.tasks] == list(base.tensors)
    assert [one.key for one in found.tasks] == list(base.tensors)
    assert all({s.name for s in one.inputs} == {one.name} for one in found.tasks)


def test_equal_numbers_share_one_method() -> None:
    assert len({id(one.method) for one in bound(TIES).tasks}) == 1
    text = TIES.replace("weight: 1", "weight: [{filter: mlp, value: 0.5}, {value: 1}]")
    assert len({id(one.method) for one in bound(text).tasks}) == 2


def test_the_seed_of_the_call_wins() -> None:
    text = TIES + "tvfast: {seed: 5}"
    assert bound(text).tasks[0].method.seed == 5  # type: ignore[union-attr]
    assert bound(text, seed=6).tasks[0].method.seed == 6  # type: ignore[union-attr]


# -- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [("", "F16"), ("dtype: float32", "F32"), ("dtype: float32\nout_dtype: bfloat16", "BF16")],
)
def test_the_type_of_the_output(keys: str, expected: str) -> None:
    stored = {"o": checkpoint("o", dtype="F16"), "a": checkpoint("a", dtype="BF16"), "b": checkpoint("b")}
    found = bound(TIES + keys, **stored)
    assert {one.dtype for one in found.tasks} == {expected}
    words = {"F16": "float16", "F32": "float32", "BF16": "bfloat16"}
    assert found.config is not None
    assert found.config["torch_dtype"] == words[expected]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {"text_config": {"dtype": "float32"}},
            {"text_config": {"dtype": "bfloat16"}, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_the_type_in_the_configuration(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = bound(COPY + "dtype: bfloat16", a=checkpoint("a", config=config))
    assert found.config is not None
    assert {key: found.config[key] for key in expected} == expected


def test_the_configuration_of_the_input_is_not_touched() -> None:
    before = checkpoint("a")
    bound(COPY + "dtype: bfloat16", a=before)
    assert before.config is not None
    assert before.config["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64", "C64"])
def test_types_that_cannot_be_merged(dtype: str) -> None:
    odd = checkpoint("b", tensors={"model.norm.weight": (dtype, (8,))}, config={"quantization_config": {}})
    with pytest.raises(DTypeError) as caught:
        bound(TIES, b=odd)
    message = str(caught.value)
    assert f"tensor 'model.norm.weight': models[1] (b) has it as {dtype} in b/model.safetensors" in message
    assert "The model is quantised." in message


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8"])
def test_integers_are_copied_and_compared(dtype: str) -> None:
    tensors = {"position_ids": (dtype, (1, 4))}
    found = bound(TIES + "dtype: bfloat16", **{name: checkpoint(name, tensors=tensors) for name in "oab"})
    one = task(found, "position_ids")
    assert (one.method, one.base, one.dtype) == (None, None, dtype)
    assert [stored.path[0] for stored in one.models] == ["o", "a", "b"]


def test_integers_beside_numbers() -> None:
    with pytest.raises(DTypeError, match="has integers in one model, another type elsewhere"):
        bound(TIES, a=checkpoint("a", tensors={"model.norm.weight": ("I32", (8,))}))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F8_E4M3", "I8"])
def test_passthrough_copies_bytes(dtype: str) -> None:
    found = bound(COPY, a=checkpoint("a", dtype=dtype))
    assert all((one.method, one.dtype) == (None, dtype) for one in found.tasks)


def test_passthrough_multiplies_and_casts_where_it_must() -> None:
    text = COPY + "parameters: {scale: [{filter: mlp, value: 2}, {value: 1}]}"
    scaled = bound(text)
    assert task(scaled, "model.layers.0.mlp.up_proj.weight").method.weights == 2.0  # type: ignore[union-attr]
    assert task(scaled, "model.norm.weight").method is None
    cast = bound(COPY + "dtype: bfloat16")
    assert all(one.method is not None and one.dtype == "BF16" for one in cast.tasks)
    assert all(one.method is None for one in bound(COPY + "dtype: float32").tasks)
    with pytest.raises(DTypeError, match="F64"):
        bound(COPY + "dtype: bfloat16", a=checkpoint("a", dtype="F64"))


# -- tensors that do not pair -----------------------------------------------------------------------------


def test_other_shapes() -> None:
    with pytest.raises(ShapeError) as caught:
        bound(TIES, b=checkpoint("b", tensors={"model.embed_tokens.weight": ("F32", (6, 8))}))
    message = str(caught.value)
    assert (
        "tensor 'model.embed_tokens.weight': models[1] (b) has shape [6, 8], base_model (o) has [4, 8]"
        in message
    )
    assert "the vocabularies differ" in message
    with pytest.raises(ShapeError, match="do not have one architecture"):
        bound(TIES, b=checkpoint("b", tensors={"model.norm.weight": ("F32", (1, 8))}))


def test_other_tensors() -> None:
    more = {f"extra.{k}": ("F32", (2,)) for k in "abcdef"}
    with pytest.raises(StateDictError) as caught:
        bound(TWO, b=checkpoint("b", tensors={**more, "model.norm.weight": None}))
    message = str(caught.value)
    assert (
        "models[1] (b) and models[0] (a) have different tensors: b lacks 1 tensor (model.norm.weight); it has"
        in message
    )
    assert "6 tensors (extra.a, extra.b, extra.c, extra.d and 2 more)" in message


@pytest.mark.parametrize(("tied", "words"), [("a", "b has besides 1 tensor"), ("b", "b lacks 1 tensor")])
def test_a_head_that_one_model_ties(tied: str, words: str) -> None:
    other = checkpoint(tied, head=False, config={"tie_word_embeddings": True})
    with pytest.raises(StateDictError) as caught:
        bound(TWO, **{tied: other})
    assert f"{words} (lm_head.weight). {tied} ties its head to its embeddings" in str(caught.value)


def test_missing_tensors_can_be_taken_from_the_base() -> None:
    text = TIES + "dtype: bfloat16\ntvfast: {on_missing: base}"
    found = bound(text, b=checkpoint("b", tensors={"model.norm.weight": None, "extra": ("F32", (2,))}))
    one = task(found, "model.norm.weight")
    assert [stored.path for stored in one.inputs] == ["o/model.safetensors"]
    assert (one.dtype, one.method is not None) == ("BF16", True)
    assert [known.name for known in found.tasks] == list(checkpoint("o").tensors)
    assert len(found.warnings) == 2
    assert "b lacks 1 tensor (model.norm.weight): copied from o" in found.warnings[0]
    assert "b has 1 tensor (extra) and o has not: left out" in found.warnings[1]


def test_one_checkpoint_under_two_paths_is_noted() -> None:
    again = replace(checkpoint("a"), path="a/")
    found = bound(TIES.replace("model: b", "model: a/"), **{"a/": again})
    assert found.warnings == ("a/ and a are the same files; they count as two models.",)
    assert len(found.tasks[0].models) == 2


def test_a_base_without_configuration_takes_that_of_a_model() -> None:
    bare = replace(checkpoint("o"), config=None)
    found = bound(TIES, o=bare, a=checkpoint("a", config={"from": "a"}, directory="a"))
    assert found.config is not None
    assert found.config["from"] == "a"
    assert found.donor == "a"
    assert found.warnings == ("o has no config.json; the output takes that of a.",)
    none = {name: replace(checkpoint(name), config=None) for name in "oab"}
    found = bound(TIES, **none)
    assert found.config is None
    assert found.warnings == ("no model has a config.json, so the output has none.",)


def test_a_revision_of_a_local_path_is_noted() -> None:
    local = replace(checkpoint("a"), path="a@v2", directory="a")
    found = bound(TIES.replace("model: a", "model: a@v2"), **{"a@v2": local})
    assert found.warnings == ("a@v2: a is a local path, which has no revisions; 'v2' is ignored.",)


def test_warnings_of_the_recipe_come_first() -> None:
    found = bound(TIES.replace("weight: 1", "weight: 1, int8_mask: true"))
    assert len(found.warnings) == 1
    assert "int8_mask" in found.warnings[0]


# -- tied tensors -----------------------------------------------------------------------------------------


def with_alias(path: str, *, ties: bool) -> Any:
    return checkpoint(
        path,
        head=False,
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        config={"tie_word_embeddings": ties},
    )


def test_a_tied_tensor_is_left_out() -> None:
    found = bound(TIES, **{name: with_alias(name, ties=True) for name in "oab"})
    assert found.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in {one.name for one in found.tasks}


def test_an_aliased_tensor_has_the_key_of_the_first() -> None:
    found = bound(TIES, **{name: with_alias(name, ties=False) for name in "oab"})
    assert found.ties == {}
    assert task(found, "lm_head.weight").key == "model.embed_tokens.weight"


def test_a_tensor_that_is_tied_in_one_model_only_stays() -> None:
    found = bound(TIES, o=with_alias("o", ties=True))
    assert found.ties == {}
    assert task(found, "lm_head.weight").key == "lm_head.weight"


# -- time -------------------------------------------------------------------------------------------------


def test_a_family_of_70b_is_bound_in_a_blink() -> None:
    models = {name: checkpoint(name, 144) for name in ("o", "a", "b", "c")}
    text = TIES.replace("{model: b}", "{model: b, parameters: {weight: [0, 0.5, 1]}}, {model: c}")
    seconds = []
    for _ in range(3):
        began = time.process_time()
        found = bound(text, **models)
        seconds.append(time.process_time() - began)
        assert len(found.tasks) == 723
    assert min(seconds) < 0.3


def test_two_architectures_are_named() -> None:
    other = {"model.layers.0.attention.dense.weight": ("F32", (4, 8)), "lm_head.weight": None}
    with pytest.raises(StateDictError, match=r"They are of two architectures, BirdModel and FishModel\."):
        bound(
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n",
            a=checkpoint("a", config={"architectures": ["FishModel"]}),
            b=checkpoint("b", config={"architectures": ["BirdModel"]}, tensors=other),
        )
