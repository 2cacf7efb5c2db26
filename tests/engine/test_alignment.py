"""Models of different vocabularies: rows by token, the tokenizer that is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvfast
from tests.vocabularies import EMBEDDINGS, HEAD, tokenizer, vocabulary, write_model
from tvfast.engine import gather as gather_module
from tvfast.errors import AdapterError, CheckpointError, DTypeError, MergeError, RecipeError, ShapeError
from tvfast.recipe import Recipe, parse_recipe

TOKENS = ["x", "y", "z"]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(*models: str, method: str = "linear", **keys: Any) -> dict[str, Any]:
    listed = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": method, "models": listed, **keys}


def merged(config: Mapping[str, Any] | Recipe, **options: Any) -> dict[str, Tensor]:
    tvfast.merge_checkpoints(config, "out", device="cpu", overwrite=True, **options)
    return load_file("out/model.safetensors")


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out/config.json").read_text())
    return found


def test_union_numbers_tokens_in_order(tmp_path: Path) -> None:
    """Tokens of the first model, then those of the second: first its vocabulary, then what was added."""
    a = write_model(tmp_path / "a", tokenizer(TOKENS, ["<a>"]), 4, seed=1)
    b = write_model(tmp_path / "b", tokenizer(["q", "y", "p"], ["<b>"], ["<a>"]), 5, seed=2)
    out = merged(recipe("a", "b", tokenizer_source="union"))
    assert vocabulary(tmp_path / "out") == {"x": 0, "y": 1, "z": 2, "<a>": 3, "q": 4, "p": 5, "<b>": 6}
    assert settings()["vocab_size"] == 7
    for name in (EMBEDDINGS, HEAD):
        mine, other = a[name], b[name]
        assert torch.equal(out[name][1], (mine[1] + other[1]) / 2)
        assert torch.equal(out[name][3], (mine[3] + other[4]) / 2)
        assert torch.equal(out[name][0], mine[0])
        assert torch.equal(out[name][4:], other[[0, 2, 3]])
    added = json.loads(Path("out/tokenizer.json").read_text())["added_tokens"]
    assert [entry["content"] for entry in added] == ["<a>", "q", "p", "<b>"]
    assert not added[0]["special"], "the first model's settings count"


def test_a_token_becomes_an_added_one(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer([*TOKENS, "</s>"]), 4, seed=1)
    write_model(tmp_path / "b", tokenizer(TOKENS, [], ["</s>"]), 4, seed=2)
    merged(recipe("a", "b", tokenizer_source="union"))
    document = json.loads(Path("out/tokenizer.json").read_text())
    assert [(t["id"], t["content"], t["special"]) for t in document["added_tokens"]] == [(3, "</s>", True)]
    assert vocabulary(tmp_path / "out") == {"x": 0, "y": 1, "z": 2, "</s>": 3}


def test_other_files_of_a_tokenizer_follow(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS, ["<a>", "<unused>"]), 4, seed=1)
    write_model(tmp_path / "b", tokenizer(TOKENS, ["<a>", "<b>"]), 5, seed=2)
    entry = {"content": "<a>", "special": False}
    decoder = {"3": entry, "4": {"content": "<unused>"}}
    Path("a/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "other": 1}))
    Path("a/added_tokens.json").write_text(json.dumps({"<a>": 3, "<unused>": 4}))
    merged(recipe("a", "b", tokenizer_source="union"))
    config = json.loads(Path("out/tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["3"] == entry
    assert config["added_tokens_decoder"]["4"]["content"] == "<b>"
    assert config["other"] == 1
    assert json.loads(Path("out/added_tokens.json").read_text()) == {"<a>": 3, "<b>": 4}


def test_tokens_without_a_row_take_their_merges_along(tmp_path: Path) -> None:
    document = tokenizer(["x", "y", "xy", "yx"])
    document["model"]["merges"] = [["x", "y"], "y x"]
    write_model(tmp_path / "a", document, 3, seed=1)
    merged(recipe("a", tokenizer_source="base"))
    written = json.loads(Path("out/tokenizer.json").read_text())["model"]
    assert written["vocab"] == {"x": 0, "y": 1, "xy": 2}
    assert written["merges"] == [["x", "y"]]


def test_padding_is_left_out_and_said_so(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", tokenizer(TOKENS), 6, seed=1)
    out = merged(recipe("a", tokenizer_source="base"))
    assert torch.equal(out[EMBEDDINGS], a[EMBEDDINGS][:3])
    plan = tvfast.plan(recipe("a", tokenizer_source="base"), device="cpu")
    assert "3 rows of a behind the last token are left out" in "".join(plan.warnings)
    assert settings()["vocab_size"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_the_mean(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float32 while it is merged, and rounded once."""
    a = write_model(tmp_path / "a", tokenizer(TOKENS), 6, seed=1, dtype=dtype)
    b = write_model(tmp_path / "b", tokenizer(["y", "w"]), 2, seed=2, dtype=dtype)
    section = {"source": "union", "pad_to_multiple_of": 8}
    out = merged(recipe("a", "b", tokenizer=section, dtype="float32"))
    wide = {name: (a[name].double(), b[name].double()) for name in (EMBEDDINGS, HEAD)}
    for name, (mine, other) in wide.items():
        mine = torch.cat([mine[:3], other[1:2]])
        other = torch.stack([mine[0], other[0], mine[2], other[1]])
        mean = (mine.mean(0) + other.mean(0)) / 2
        assert out[name].shape[0] == 8
        assert (out[name][4:].double() - mean).abs().max() < 1e-6
    assert settings()["vocab_size"] == 8


def test_models_of_two_types(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1, dtype=torch.bfloat16)
    b = write_model(tmp_path / "b", tokenizer(["z", "y", "x"]), 3, seed=2, dtype=torch.float32)
    out = merged(recipe("a", "b", tokenizer_source="base"))
    mean = (a[EMBEDDINGS].float() + b[EMBEDDINGS].flip(0)) / 2
    assert torch.equal(out[EMBEDDINGS], mean.to(torch.bfloat16))


def test_any_memory_any_windows_and_any_threads_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"w{k}" for k in range(700)]
    write_model(tmp_path / "o", tokenizer(words), 700, seed=1, dtype=torch.bfloat16)
    write_model(tmp_path / "a", tokenizer(words[::-1], ["<a>"]), 720, seed=2, dtype=torch.bfloat16)
    write_model(tmp_path / "b", tokenizer(words[100:], ["<a>", "<b>"]), 602, seed=3, dtype=torch.bfloat16)
    config = recipe(
        "a",
        "b",
        method="ties",
        base_model="o",
        parameters={"density": 0.4},
        tokenizer={"source": "union", "pad_to_multiple_of": 64},
    )
    first = merged(config, threads=1)
    monkeypatch.setattr(gather_module, "WINDOW_BYTES", 1000)
    monkeypatch.setattr("tvfast.engine.cuts.CUT", 96)  # pieces of rows
    monkeypatch.setattr("tvfast.engine.plan.UNIT_BYTES", 40_000)
    again = merged(config, threads=3)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_tied_head_needs_no_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1, tied=True)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2, tied=True)
    out = merged(recipe("a", "b", tokenizer_source="union"))
    assert HEAD not in out
    assert out[EMBEDDINGS].shape[0] == 4


def test_a_model_without_a_tokenizer_has_that_of_the_first(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", tokenizer(TOKENS), 4, seed=1)
    b = write_model(tmp_path / "b", None, 4, seed=2)
    out = merged(recipe("a", "b", tokenizer_source="base"))
    assert torch.equal(out[EMBEDDINGS], (a[EMBEDDINGS][:3] + b[EMBEDDINGS][:3]) / 2)
    plan = tvfast.plan(recipe("a", "b", tokenizer_source="base"), device="cpu")
    assert "b has no tokenizer; it is taken to have that of a." in plan.warnings


def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    """A tensor outside of layers with a row per token, where nothing in the layers is of this extent."""
    renamed = {EMBEDDINGS: "front.table", HEAD: "back.table"}
    tensors = {}
    for name, words, seed in (("a", [*TOKENS, "v", "w"], 1), ("b", ["w", "u", "y"], 2)):
        tensors[name] = write_model(tmp_path / name, tokenizer(words), len(words), seed=seed)
        state = {renamed.get(key, key): value for key, value in tensors[name].items()}
        save_file(state, tmp_path / name / "model.safetensors")
    out = merged(recipe("a", "b", tokenizer_source="union"))
    assert out["front.table"].shape[0] == 6
    assert torch.equal(out["back.table"][5], tensors["b"][HEAD][1])


def test_positions_are_no_tokens(tmp_path: Path) -> None:
    """A table of as many positions as there are tokens."""
    for name, words in (("a", TOKENS), ("b", TOKENS[::-1])):
        state = write_model(tmp_path / name, tokenizer(words), 3, seed=len(name))
        state["model.embed_positions.weight"] = torch.arange(24.0).reshape(3, 8)
        save_file(state, tmp_path / name / "model.safetensors")
    out = merged(recipe("a", "b", tokenizer_source="base"))
    assert torch.equal(out["model.embed_positions.weight"], torch.arange(24.0).reshape(3, 8))


def test_a_run_with_other_tokens_is_another_run(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    config = recipe("a", "b", tokenizer_source="base")
    merged(config)
    assert tvfast.merge_checkpoints(config, "out", device="cpu", resume=True).finished_before
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(tokenizer(["w", "z"])))
    with pytest.raises(tvfast.errors.OutputError):
        tvfast.merge_checkpoints(config, "out", device="cpu", resume=True)


def test_a_file_that_shrinks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    from tvfast.engine import gathering

    def ends(*_: Any) -> None:
        raise EOFError(1, 70)

    monkeypatch.setattr(gathering, "gather_rows", ends)
    with pytest.raises(MergeError, match=r"b/model\.safetensors: ends at byte 70, in the middle of a row"):
        merged(recipe("a", "b", tokenizer_source="union"))


def test_without_a_section_other_vocabularies_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    with pytest.raises(ShapeError, match=r"the vocabularies differ: add `tokenizer: \{source: union\}`"):
        merged(recipe("a", "b"))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"source": "b"}, r"tokens\.x\.source: b has no token 'x'"),
        ({"source": {"kind": "model_token", "model": "b", "token": "v"}}, "b has no token 'v' with a row"),
        (
            {"source": {"kind": "model_token", "model": "b", "token_id": 2}},
            "b has no token 2 with a row of its 2",
        ),
    ],
)
def test_rules_that_name_no_row(rule: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    with pytest.raises(RecipeError, match=words):
        merged(recipe("a", "b", tokenizer={"tokens": {"x": rule}}))


def test_rows_that_differ_in_more_than_their_number(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    b = write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    save_file({**b, EMBEDDINGS: torch.ones(2, 5)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(
        ShapeError, match=r"b has shape \[2, 5\], a has \[3, 8\]; .*do not have one architecture"
    ):
        merged(recipe("a", "b", tokenizer_source="union"))


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_a_tokenizer_of_the_hub_that_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "hub" / "models--acme--words" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(json.dumps(tokenizer(["z", "x"])))
    refs = tmp_path / "hub" / "models--acme--words" / "refs"
    refs.mkdir()
    (refs / "v2").write_text("c0ffee")

    def config(source: str) -> dict[str, Any]:
        return recipe("a", **{key: {"source": source} if key == "tokenizer" else source})

    merged(config("acme/words@v2"))
    assert vocabulary(tmp_path / "out") == {"z": 0, "x": 1}
    with pytest.raises(CheckpointError, match=r"acme/other: .*not in the local cache.*HF_HUB_OFFLINE"):
        merged(config("acme/other"))


def test_a_tokenizer_without_its_own_file_is_converted(tmp_path: Path) -> None:
    """GPT-2's files, through transformers, only where tokens are added."""
    write_model(tmp_path / "a", None, 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    Path("a/vocab.json").write_text(json.dumps({"x": 0, "y": 1, "z": 2}))
    Path("a/merges.txt").write_text("#version: 0.2\n")
    Path("a/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    pytest.importorskip("transformers")
    merged(recipe("a", "b", tokenizer_source="union"))
    found = vocabulary(tmp_path / "out")
    assert {token: found[token] for token in ("x", "y", "z")} == {"x": 0, "y": 1, "z": 2}
    assert "w" in found


def test_a_tokenizer_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "a", None, 3, seed=1)
    write_model(tmp_path / "b", tokenizer(["z", "w"]), 2, seed=2)
    Path("a/spiece.model").write_bytes(b"")
    with pytest.raises(
        RecipeError, match=r"tokenizer_source: the tokenizer in .*a has no tokenizer\.json, which"
    ):
        merged(recipe("a", "b", tokenizer_source="union"))


def test_one_file_has_no_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    with pytest.raises(RecipeError, match=r"a/model\.safetensors is one file, without a tokenizer"):
        merged(recipe("a/model.safetensors", tokenizer_source="base"))


def test_a_damaged_configuration_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "a", tokenizer(TOKENS, ["<u>"]), 3, seed=1)
    Path("a/added_tokens.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: holds no JSON object"):
        merged(recipe("a", tokenizer_source="base"))


def written_in_other_order(tmp_path: Path) -> None:
    """Models a and b of one vocabulary in two orders, and c, which is b in the order of a."""
    write_model(tmp_path / "a", tokenizer(TOKENS), 3, seed=1)
    b = write_model(tmp_path / "b", tokenizer(TOKENS[::-1]), 3, seed=2)
    write_model(tmp_path / "c", tokenizer(TOKENS), 3, seed=2)
    flipped = {name: b[name].flip(0).contiguous() for name in (EMBEDDINGS, HEAD)}
    save_file({**b, **flipped}, tmp_path / "c" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("karcher", {}), ("nuslerp", {"nuslerp_flatten": False}), ("multislerp", {})],
)
def test_methods_of_rows_and_of_whole_tensors(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    written_in_other_order(tmp_path)
    keys = {"method": method, "parameters": parameters, "tokenizer_source": "base"}
    found, expected = merged(recipe("a", "b", **keys)), merged(recipe("a", "c", **keys))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_of_codes_are_refused_unless_they_stay(tmp_path: Path) -> None:
    written_in_other_order(tmp_path)
    for name in ("b", "c"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors[EMBEDDINGS] = tensors[EMBEDDINGS].to(torch.float8_e4m3fn)
        tensors[f"{EMBEDDINGS}_scale"] = torch.ones(1)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DTypeError, match=r"'model.embed_tokens.weight': b has it as F8_E4M3 codes in .*stage"
    ):
        merged(recipe("a", "b", tokenizer_source="base"))
    wide = {"name": "wide", **recipe("b", method="passthrough", dtype="float32")}
    stages = "\n---\n".join(map(json.dumps, (wide, recipe("a", "wide", tokenizer_source="base"))))
    found = merged(parse_recipe(stages, "r.yml"))
    expected = merged(recipe("a", "c", tokenizer_source="base"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write_adapter(folder: Path, name: str) -> None:
    """LoRA of rank 1 of one module."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"A": torch.full((1, 8), 0.5), "B": torch.ones(3 if name == "lm_head" else 8, 1)}
    stored = {f"base_model.model.{name}.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(stored, folder / "adapter_model.safetensors")


def test_adapters_to_rows_are_refused_unless_these_stay(tmp_path: Path) -> None:
    written_in_other_order(tmp_path)
    write_adapter(tmp_path / "head", "lm_head")
    write_adapter(tmp_path / "inside", "model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match=r"'lm_head.weight': b\+head adds an adapter to it, .*stage"):
        merged(recipe("a", "b+head", tokenizer_source="base"))
    found = merged(recipe("a", "b+inside", tokenizer_source="base"))
    expected = merged(recipe("a", "c+inside", tokenizer_source="base"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    summed = {"name": "summed", **recipe("b+head", method="passthrough")}
    stages = "\n---\n".join(map(json.dumps, (summed, recipe("a", "summed", tokenizer_source="base"))))
    found = merged(parse_recipe(stages, "r.yml"))
    expected = merged(recipe("a", "c+head", tokenizer_source="base"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
