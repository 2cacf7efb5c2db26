"""Values of parameters. Expected numbers were produced by mergekit 0.1.5."""

from __future__ import annotations

from typing import Any

import pytest

from tvfast.errors import RecipeError
from tvfast.recipe.document import compose
from tvfast.recipe.settings import Setting, read_setting


def setting(text: str, *, flag: bool = False) -> Setting:
    return read_setting(compose(f"x: {text}", "r.yml").mapping()["x"], flag=flag)


def along(text: str, *, flag: bool = False, name: str = "n") -> list[Any]:
    """Values in a model of five layers."""
    found = setting(text, flag=flag)
    return [found.at(name, k / 4) for k in range(5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", [0.3] * 5),
        ("1e-3", [0.001] * 5),
        ("' 1e-3 '", [0.001] * 5),
        ("true", [1.0] * 5),
        ("[3]", [3.0] * 5),
        ("[0, 1]", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("[1, 2, 10]", [1.0, 1.5, 2.0, 6.0, 10.0]),
        ("[1e-3, 1e-1]", [0.001, 0.025750000000000002, 0.0505, 0.07525000000000001, 0.1]),
        ("['1', '3']", [1.0, 1.5, 2.0, 2.5, 3.0]),
        ("[true, false]", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("[1, true, 2]", [1.0, 1.0, 1.0, 1.5, 2.0]),
        ("[1, 2, 4, 8, 16, 32]", [1.0, 2.5, 6.0, 14.0, 32.0]),
        ("[0.1, 0.7, 0.3]", [0.1, 0.39999999999999997, 0.7, 0.5, 0.3]),
    ],
)
def test_gradients(text: str, expected: list[float]) -> None:
    assert along(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "TTTTT"),
        ("'off'", "FFFFF"),
        ("0", "FFFFF"),
        ("1.0", "TTTTT"),
        ("[true, false]", "TTTTF"),
        ("[0, 1]", "FFFFT"),
        ("[true, false, true]", "TTFFT"),
        ("[0, 1, 0]", "FFTTF"),
        ("['yes', 'no']", "TTTTF"),
        ("['true', 'false', 'true', 'false']", "TTFTF"),
    ],
)
def test_flags_go_in_steps(text: str, expected: str) -> None:
    assert "".join("FT"[bool(value)] for value in along(text, flag=True)) == expected


def test_the_first_filter_that_fits_counts() -> None:
    found = setting(
        "[{filter: norm, value: [0, 4]}, {filter: head, value: 7}, {filter: '*', value: 5}, {value: 6}]"
    )
    assert [found.at("model.norm", k / 4) for k in range(5)] == [0, 1, 2, 3, 4]
    assert found.at("lm_head", 0.5) == 7
    assert found.at("q_proj", 0.5) == 5


@pytest.mark.parametrize("text", ["{filter: a, value: 1}", "[{filter: a, value: 1}, {filter: b, value: 2}]"])
def test_no_filter_fits(text: str) -> None:
    assert setting(text).at("c", 0.0) is None


@pytest.mark.parametrize(
    "text", ["{value: 3}", "{filter: null, value: 3}", "{filter: '', value: 3}", "[{value: 3}]"]
)
def test_filters_that_fit_everything(text: str) -> None:
    assert setting(text).at("any", 0.0) == 3.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("abc", "x: is 'abc'; expected a number"),
        ("", "x: is empty (null); expected a number"),
        ("[]", "x: is an empty list; expected one value at least"),
        (".nan", "x: is nan; expected a finite number"),
        ("'inf'", "x: is 'inf'; expected a finite number"),
        ("1e999", "expected a finite number"),
        ("2001-01-01", "expected a number"),
        ("'0x10'", "expected a number"),
        ("'1,5'", "expected a number"),
        ("[1, a]", "x[1]: is 'a'; expected a number"),
        ("[1, {value: 3}]", "x[1]: is a mapping with value; expected a number"),
        ("[[1]]", "x[0]: is a list of 1"),
        ("{a: 3}", "x.a: no such key. Expected filter or value"),
        ("{filter: a}", "has no 'value'"),
        ("{filter: 3, value: 1}", "x.filter: is 3; expected a part of a tensor name"),
        ("{filter: [a, b], value: 1}", "x.filter: is a list of 2"),
        ("{filter: a, valu: 1}", "Did you mean 'value'?"),
        ("{value: {value: 1}}", "x.value: is a mapping"),
        ("{value: null}", "x.value: is empty"),
        ("[{value: []}]", "x[0].value: is an empty list"),
    ],
)
def test_refused_numbers(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        setting(text)
    assert str(caught.value).startswith("r.yml, line 1: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["2", "0.5", "abc", "[1, 2]", "null", ".nan"])
def test_refused_flags(text: str) -> None:
    with pytest.raises(RecipeError, match="expected true or false"):
        setting(text, flag=True)
