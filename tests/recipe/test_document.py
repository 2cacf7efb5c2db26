"""YAML as recipes need it: its traps, its bombs, and where an error points."""

from __future__ import annotations

import math
import os
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvfast.errors import RecipeError
from tvfast.recipe import load_recipe, parse_recipe
from tvfast.recipe.document import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, Value, compose, from_mapping


def plain(value: Value) -> Any:
    if isinstance(value.plain, dict):
        return {key: plain(item) for key, item in value.mapping().items()}
    if isinstance(value.plain, tuple):
        return [plain(item) for item in value.sequence("a list")]
    return value.plain


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(text, "r.yml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1e-3", "1e-3"),  # YAML 1.1 wants a dot and a sign; who reads numbers takes the text
        ("a: 1.0e-3", 0.001),
        ("a: 1_000", 1000),
        ("a: 0x1F", 31),
        ("a: 1:30", 90),
        ("a: yes", True),
        ("a: OFF", False),
        ("a: y", "y"),
        ("a: 'yes'", "yes"),
        ("a: ~", None),
        ("a:", None),
        ("a: ''", ""),
        ("a: 2001-01-01", "2001-01-01"),
        ("a: !!str 12", "12"),
        ("a: !!float 12", 12.0),
        ("a: ! 12", "12"),
        ("a: =", "="),
        ("a: .5", 0.5),
        ("a: -.inf", -math.inf),
    ],
)
def test_scalars(text: str, expected: object) -> None:
    found = plain(compose(text, "r.yml"))["a"]
    assert found == expected
    assert type(found) is type(expected)


def test_anchors_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3}\nc: {<<: [*b, *a], z: 4}\nd: {y: 9, <<: *a}\ne: *a"
    found = plain(compose(text, "r.yml"))
    assert found["c"] == {"x": 1, "y": 3, "z": 4}
    assert found["d"] == {"x": 1, "y": 9}
    assert found["e"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1, 2\nb: 3", 2, "column 2"),
        ("a: 1\n b: 2", 2, "mapping values"),
        ("a: 1\na: 2", 2, "key 'a' is there twice, first in line 1"),
        ("x: 1\n1: 2", 2, "a key is 1; expected a text"),
        ("x: 1\non: 2", 2, "a key is true; expected a text. Put it in quotes"),
        ("[a]: 2", 1, "a key is a list of 1"),
        ("a: 1\n---\nb: 2", 3, "a second document"),
        (
            "a: !!python/object:os.system x",
            1,
            "tag tag:yaml.org,2002:python/object:os.system is not supported",
        ),
        ("a: !mine [1]", 1, "tag !mine is not supported"),
        ("a: !!set {b}", 1, "not supported"),
        ("a: !!int twelve", 1, "'twelve' is no int"),
        ("a: !!bool 3", 1, "'3' is no bool"),
        ("a: !!int ''", 1, "'' is no int"),
        ("a: 0x_", 1, "'0x_' is no int"),
        ("a: *b", 1, "alias *b stands for nothing"),
        ("a: &a [*a]", 1, "alias *a stands for nothing that ends before it"),
        ("b: 1\n<<: 3", 2, "'<<' stands before something else"),
        ("a: 1\nb: \x07", 2, "column 4: has the character U+0007"),
        ("a: \ud800", 1, "U+D800"),
        ("a:\n\tb: 1", 2, "column 1"),
        ("%YAML 3.0\n---\na: 1", 1, "incompatible"),
        (f"a: {'9' * 100}", 1, "a number of 100 characters"),
        (f"a: 1{':1' * 100_000}", 1, "a number of 200001 characters"),
    ],
)
def test_refusals_say_where(text: str, line: int, words: str) -> None:
    message = refused(text)
    assert message.startswith(f"r.yml, line {line}"), message
    assert words in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n...\n"])
def test_nothing(text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yml.*is empty.*; expected a mapping with merge_method"):
        parse_recipe(text, "r.yml")


def test_depth_is_bounded() -> None:
    assert plain(compose("[" * MAX_DEPTH + "]" * MAX_DEPTH, "r.yml"))
    assert f"deeper than {MAX_DEPTH}" in refused("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    # Some releases of the YAML library have a limit of their own.
    assert re.search("deeper|nesting depth", refused("[" * 400_000))
    assert "deeper" in refused("- " * 400_000)


def test_aliases_cannot_multiply() -> None:
    levels = [f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]" for k in range(9)]
    began = time.process_time()
    message = refused("\n".join(["a0: &a0 [lol, lol]", *levels]))
    assert f"more than {MAX_NODES} values" in message
    assert time.process_time() - began < 0.5


def test_large_documents_are_refused_quickly() -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        assert "values" in refused("- 1\n" * (MAX_CHARACTERS // 4))
        assert "characters" in refused("x" * (MAX_CHARACTERS + 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 20  # traced; a tenth of it otherwise
    assert peak < 200_000_000


def test_a_mapping_becomes_the_same_tree(tmp_path: Path) -> None:
    source = {"a": [1, 2.5, (True, None)], "b": {"c": tmp_path, "d": np.float32(0.5), "e": np.int64(3)}}
    expected = {"a": [1, 2.5, [True, None]], "b": {"c": os.fspath(tmp_path), "d": 0.5, "e": 3}}
    assert plain(from_mapping(source, "recipe")) == expected


def test_mappings_that_yaml_could_not_hold() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    cases = [({"a": {1: 2}}, "a has the key 1"), ({"a": [object()]}, "a[0]: is a object"), (circle, "deeper")]
    for source, words in cases:
        with pytest.raises(RecipeError, match="recipe: ") as caught:
            from_mapping(source, "recipe")
        assert words in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    cases = [
        (b"a: \xff", "line 1: byte 0xff is no UTF-8"),
        ("a: 1\nb: 2".encode("utf-16"), "line 1: byte 0xff is no UTF-8"),
        (b"#" * (MAX_CHARACTERS + 1), "more than 1000000 bytes"),
        (b"- 1", "is a list of 1; expected a mapping"),
        (b"linear", "is 'linear'; expected a mapping"),
    ]
    for data, words in cases:
        path.write_bytes(data)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(str(path))
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/file.yml", "no such file"),
        (".", "is a directory"),
        ("merge_method: linear\n", "got text, not a path"),
        ("a\0b", "is no path"),
    ],
)
def test_no_file(source: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert words in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, ["merge_method"], b"recipe.yml", object()])
def test_what_is_neither_path_nor_mapping(source: Any) -> None:
    with pytest.raises(RecipeError, match=f"got a {type(source).__name__}; expected the path"):
        load_recipe(source)
