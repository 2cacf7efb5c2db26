"""The tokenizer section, and keys that mergekit reads without effect."""

from __future__ import annotations

import pytest

from tests.recipe.test_parsing import LINEAR, parse, refused
from tvfast.recipe import OtherRow, OwnRow, ZeroRow


def test_rules_for_tokens() -> None:
    found = parse(
        LINEAR
        + """
tokenizer:
  source: union
  tokens:
    <a>: {source: b}
    <b>: {source: {kind: model_token, model: a, token: x}, force: true}
    <c>: {source: {kind: model_token, model: {model: {path: a}}, token_id: 7}}
    <d>: {source: {kind: zero}, force: false}
    <e>: {}
  pad_to_multiple_of: 8
"""
    ).tokenizer
    assert found is not None
    assert found.multiple == 8
    assert [(rule.token, rule.row, rule.model, rule.force) for rule in found.rules] == [
        ("<a>", OwnRow(), "b", False),
        ("<b>", OtherRow("x"), "a", True),
        ("<c>", OtherRow(7), "a", False),
        ("<d>", ZeroRow(), None, False),
        ("<e>", None, None, False),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LINEAR + "tokenizer: {tokens: [x]}", "tokenizer.tokens: is a list of 1; expected a mapping"),
        (
            LINEAR + "tokenizer: {tokens: {x: b}}",
            "tokens.x: is 'b'; expected a mapping with source and force",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: c}}}",
            "'c' is no input of this recipe; expected one of a, b",
        ),
        (LINEAR + "tokenizer: {tokens: {x: {force: true}}}", "force needs a source"),
        (LINEAR + "tokenizer: {tokens: {x: {source: b, force: 3}}}", "force: is 3; expected true or false"),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: own}}}}",
            "kind: is 'own'; expected model_token or zero",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: zero, model: b}}}}",
            "model: does not go with kind zero",
        ),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, token: y}}}}", "has no model"),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: b}}}}",
            "neither token and token_id",
        ),
        (
            LINEAR
            + "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token: y, token_id: 3}}}}",
            "has both token and token_id",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token_id: -1}}}}",
            "token_id: is -1; expected the number of a token",
        ),
        (LINEAR + "tokenizer: {tokens: {'': {source: b}}}", "the token is empty"),
        (
            LINEAR + "tokenizer: {pad_to_multiple_of: 0}",
            "pad_to_multiple_of: is 0; expected a number of rows",
        ),
        (LINEAR + "tokenizer: {pad_to_multiple_of: true}", "pad_to_multiple_of: is true; expected a number"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    assert words in refused(text)


def test_a_residual_that_mergekit_does_not_add_is_refused() -> None:
    part = "{residual_weight: 0.5, sources: [{model: a, layer_range: [0, 2]}]}"
    text = f"merge_method: passthrough\nslices: [{part}]\n"
    assert "has no effect in mergekit, which reads it and adds no residual" in refused(text)
