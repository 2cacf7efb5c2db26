"""Recipes and ways to break them."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import yaml

SEEDS = (
    """merge_method: ties
base_model: org/base
models:
  - model: org/one
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: org/two
    parameters:
      density: 0.5
      weight:
        - {filter: mlp, value: [0, 0.5]}
        - {value: 1e-1}
parameters: {normalize: true, int8_mask: true, lambda: 0.9}
dtype: float32
out_dtype: bfloat16
""",
    """slices:
  - sources:
      - {model: a, layer_range: [0, 24]}
      - {model: b, layer_range: [8, 32]}
    parameters: {t: [0, 0.5, 1]}
  - sources:
      - {model: b, layer_range: [8, 16], parameters: {}}
      - {model: a, layer_range: [0, 8]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
tokenizer_source: base
""",
    """merge_method: linear
models:
  - &first
    model: {model: {path: some/where, revision: main}, lora: null}
    parameters: &numbers {weight: "0.3"}
  - {model: other, parameters: {<<: *numbers, weight: 1_0}}
tvfast: {seed: 7, tie: index, on_missing: base, nonfinite: propagate, out_shard_size: 2GB}
chat_template: auto
""",
    """# layers on layers
merge_method: passthrough
slices:
- sources:
  - model: a
    layer_range: [0, 3]
- sources:
  - model: b
    layer_range: ["1", 4]
    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - value: 1.0
tokenizer: {source: union}
out_shard_size: 5B
""",
    """merge_method: della
base_model: x
models: [{model: y, parameters: {weight: 0.6, density: 0.5, epsilon: 0.2}}, {model: z}]
parameters: {weight: 1, rescale: yes, normalize: [on, off]}
""",
    """merge_method: sce
base_model: "base model"
models:
  - {model: 'm''1'}
  - model: |
      two lines
      of a name
parameters: {select_topk: .4}
tvfast: {dialect: paper}
""",
)

WORDS = (
    *"{}[],:?-&*!|>'\"%@`#~=<\\\t\n\r ",
    "\n  ",
    "\n- ",
    ": ",
    "&a ",
    "*a",
    "*first",
    "<<: ",
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!python/object:os.system ",
    "!<tag:yaml.org,2002:str> ",
    "---\n",
    "...\n",
    "%YAML 1.2\n---\n",
    "null",
    "~",
    "true",
    "off",
    ".nan",
    "-.inf",
    "1e400",
    "-1",
    "0",
    "1e-3",
    "0x1F",
    "0b_",
    "1:30:59",
    "9" * 70,
    "2001-01-01",
    "[]",
    "{}",
    "[1, 2, 3]",
    "{filter: a, value: 1}",
    "\u00e9\u4e2d\U0001f600",
    "\ufeff",
    "\x00",
    "\x07",
    "\ud800",
    "\u2028",
    "merge_method: linear\n",
    "base_model: a\n",
    "models:\n",
    "slices:\n",
    "modules: {}\n",
    "tvfast:\n",
    "parameters: ",
    "weight: ",
    "density: ",
    "lambda: ",
    "dtype: float16\n",
    "ties",
    "nuslerp",
    "slerp",
    "passthrough",
    "breadcrumbs",
    "a+b",
    "a@main",
    "union",
)


TREES = tuple(json.dumps(yaml.safe_load(text)) for text in SEEDS)

PLAIN = (
    *("ties", "slerp", "linear", "sce", "della", "passthrough", "nuslerp", "dare_ties", "paper", "mergekit"),
    *("model", "models", "slices", "sources", "layer_range", "base_model", "parameters", "weight", "density"),
    *("t", "tie", "seed", "value", "filter", "a", "b", "org/base", "bfloat16", "float64", "5B", "2GiB", "0B"),
    *("0", "1", "-1", "2.5", "1e-3", "1_0", ".inf", "1e99", "yes", "off", "null", "~", "'8'", "[]", "[0, 1]"),
    "{value: 2}",
)

VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        0.5,
        1.5,
        -0.25,
        1e-3,
        1e30,
        1e40,
        10**400,
        2**63,
        math.inf,
        math.nan,
    ),
    *("", "a", "b", "org/base", "base", "union", "0.5", "1e-3", "yes", "off", "nan", "float16", "5B", "a+b"),
    *("*", "mlp", "ge", "hash", "paper", "error", "main", "\u00e9", "auto"),
    *([], [0], [0, 0.5, 1], [True, False], ["1", 2], [0, 2], [2, 0], [[1]], [None], {}, {"value": 0.5}),
    *({"filter": "mlp", "value": [1, 0]}, {"filter": None, "value": "x"}, [{"filter": "*", "value": 0.3}]),
    *({"model": "a"}, {"model": {"path": "b", "revision": "x"}}, {"model": "c", "layer_range": [0, 2]}),
    *(["linear"], [{"model": "a"}, {"model": "b"}], {"weight": 1}, {"weight": [1, 2], "density": 0.5}),
)

KEYS = (
    *(
        "merge_method",
        "base_model",
        "models",
        "slices",
        "modules",
        "parameters",
        "dtype",
        "out_dtype",
        "tvfast",
    ),
    *("tokenizer_source", "tokenizer", "chat_template", "out_shard_size", "name", "sources", "layer_range"),
    *("model", "lora", "path", "revision", "override_architecture", "residual_weight", "filter", "value"),
    *("weight", "density", "gamma", "epsilon", "t", "lambda", "normalize", "rescale", "int8_mask", "scale"),
    *(
        "select_topk",
        "select_in_merge",
        "wieght",
        "seed",
        "tie",
        "dialect",
        "nonfinite",
        "on_missing",
        "source",
    ),
)

METHODS = (
    *(
        "linear",
        "slerp",
        "passthrough",
        "task_arithmetic",
        "ties",
        "dare_ties",
        "dare_linear",
        "della",
        "sce",
    ),
    *("della_linear", "breadcrumbs", "breadcrumbs_ties", "nuslerp", "model_stock", "tis"),
)


def mutated(rng: random.Random) -> str:
    """A recipe with a few changes, to its text or to what the text says."""
    return _changed_text(rng) if rng.random() < 0.5 else _changed_values(rng)


def _changed_values(rng: random.Random) -> str:
    """YAML that is sound, as JSON, of a recipe with other values, other keys, or fewer of them."""
    tree = json.loads(rng.choice(TREES))
    if rng.random() < 0.3:
        tree["merge_method"] = rng.choice(METHODS)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        change = rng.randrange(5)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key)
        elif change == 2 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(tree)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or mapping with every position or key that it has."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _changed_text(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 6))):
        text = rng.choice(_CHANGES)(text, rng)
    return text


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(WORDS) + text[at:]


def _replace(text: str, rng: random.Random) -> str:
    at, n = rng.randint(0, len(text)), rng.randint(1, 8)
    return text[:at] + rng.choice(WORDS) + text[at + n :]


def _delete(text: str, rng: random.Random) -> str:
    at, n = rng.randint(0, len(text)), rng.randint(1, 12)
    return text[:at] + text[at + n :]


def _any_character(text: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) + text[at:]


def _line(text: str, rng: random.Random) -> str:
    """A line is dropped, doubled, moved or indented otherwise."""
    lines = text.splitlines(keepends=True) or [""]
    k = rng.randrange(len(lines))
    line = lines.pop(k)
    change = rng.randrange(4)
    if change == 1:
        lines[k:k] = [line, line]
    elif change == 2:
        lines.insert(rng.randint(0, len(lines)), line)
    elif change == 3:
        lines.insert(k, " " * rng.randint(0, 6) + line.lstrip(" "))
    return "".join(lines)


def _value(text: str, rng: random.Random) -> str:
    """What follows a colon becomes something else."""
    colons = [i for i, character in enumerate(text) if character == ":"] or [len(text)]
    at = rng.choice(colons) + 1
    end = text.find("\n", at)
    return f"{text[:at]} {rng.choice(WORDS)}{text[end if end >= 0 else len(text) :]}"


def _splice(text: str, rng: random.Random) -> str:
    other = rng.choice(SEEDS)
    return text[: rng.randint(0, len(text))] + other[rng.randint(0, len(other)) :]


def _word(text: str, rng: random.Random) -> str:
    """One word or number becomes another."""
    found = list(re.finditer(r"[\w.]+", text))
    if not found:
        return text
    match = rng.choice(found)
    return text[: match.start()] + rng.choice(PLAIN) + text[match.end() :]


_CHANGES = (
    _word,
    _word,
    _word,
    _insert,
    _replace,
    _delete,
    _any_character,
    _line,
    _line,
    _value,
    _value,
    _splice,
)
