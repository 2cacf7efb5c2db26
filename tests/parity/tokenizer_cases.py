"""Recipes with tokenizer sections on models of different vocabularies, and what is compared of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tests.vocabularies import EMBEDDINGS, HEAD, tokenizer, vocabulary, write_model

_SHARED = [f"w{k}" for k in range(20)]
_WEIGHT = {"parameters": {"weight": 0.5}}
_THREE = [{"model": name, **_WEIGHT} for name in ("base", "chat", "code")]
_TWO = [{"model": name, **_WEIGHT} for name in ("base", "chat")]


def write_members(folder: Path) -> None:
    """A base; one with tokens of its own, in another order, and padding; a part; one with unused tokens."""
    chat = [*reversed(_SHARED), *(f"u{k}" for k in range(5))]
    code = [*_SHARED[5:], "c0", "u2", "c1", "u1", "c2"]
    write_model(folder / "base", tokenizer(_SHARED, ["<a>"], ["</s>"]), 22, seed=1)
    write_model(folder / "chat", tokenizer(chat, [], ["</s>", "<|im_start|>", "<|im_end|>"]), 32, seed=2)
    write_model(folder / "code", tokenizer(code, ["<a>", "</s>"]), 22, seed=3)
    write_model(folder / "unused", tokenizer(_SHARED, ["<a>", "</s>", "x0", "x1", "x2"]), 22, seed=4)


def _recipe(tokenizer: Any, models: Any = _THREE, method: str = "linear", **keys: Any) -> dict[str, Any]:
    section = {"tokenizer": tokenizer} if isinstance(tokenizer, dict) else {"tokenizer_source": tokenizer}
    return {
        "merge_method": method,
        "base_model": "base",
        "models": models,
        "dtype": "float32",
        **section,
        **keys,
    }


_RULES = {
    "<|im_start|>": {"source": "chat"},
    "w3": {"source": "chat", "force": True},
    "w4": {"source": {"kind": "zero"}, "force": True},
    "u1": {"source": {"kind": "zero"}},
    "<new>": {"source": {"kind": "model_token", "model": "code", "token": "c1"}},
    "<other>": {"source": {"kind": "model_token", "model": "chat", "token_id": 3}, "force": True},
    "u3": {"source": {"kind": "model_token", "model": "chat", "token": "u0"}},
}

CASES: dict[str, dict[str, Any]] = {
    "union": _recipe("union"),
    "base": _recipe("base"),
    "model": _recipe("code"),
    "section": _recipe({"source": "union"}),
    "default": _recipe({"pad_to_multiple_of": 1}),
    "rules": _recipe({"source": "union", "tokens": _RULES}),
    "rules-base": _recipe({"source": "base", "tokens": {"<new>": _RULES["<new>"]}}),
    "padded": _recipe({"source": "union", "pad_to_multiple_of": 16}, method="task_arithmetic"),
    "padded-model": _recipe({"source": "chat", "pad_to_multiple_of": 8}),
    "ties": _recipe("union", method="ties", parameters={"density": 0.5}),
    "slerp": _recipe("union", [{"model": "base"}, {"model": "chat"}], method="slerp", parameters={"t": 0.3}),
    "unused": _recipe("union", [*_TWO, {"model": "unused", **_WEIGHT}]),
    "unused-base": {**_recipe("base", [*_TWO, {"model": "unused", **_WEIGHT}]), "base_model": "unused"},
    "means": {
        **{key: value for key, value in _recipe("union").items() if key != "models"},
        "slices": [
            {
                "sources": [
                    {"model": name, "layer_range": [0, 2], **_WEIGHT} for name in ("chat", "code", "unused")
                ]
            }
        ],
    },
    "copied": {
        **{key: value for key, value in _recipe("union").items() if key != "models"},
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "base", "layer_range": [0, 2]}]},
            {"sources": [{"model": "chat", "layer_range": [1, 2]}]},
        ],
    },
}


def tokens_and_rows(out: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens of an output by name; of every matrix by token their rows, then what is behind them."""
    numbers = vocabulary(out)
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors.update(load_file(file))
    order = [numbers[token] for token in sorted(numbers)]
    found = {}
    for name in (EMBEDDINGS, HEAD):
        matrix = tensors[name].numpy()
        found[name] = np.concatenate([matrix[order], matrix[len(numbers) :]])
    return sorted(numbers), found
