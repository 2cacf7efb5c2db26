"""Tiny transformers models with random weights, tokenizers and data, made on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="tvfast collect needs transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept", "far")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
N_TOKENS = len(WORDS) + len(SPECIALS) + 4

LINES = [
    "the cat sat on the mat",
    "a dog ran under the tree and slept",
    "then the dog sat",
    "",
    "the cat and the dog ran far",
    "a mat on a mat",
]


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=N_TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(kind: str = "BertForMaskedLM", **options: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=N_TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def saved(folder: Path, name: str, make: Any, seed: int, start: Any = None) -> Path:
    """A model directory with a tokenizer; fine-tuned by noise from `start` where that is given."""
    torch.manual_seed(seed)
    model = make()
    if start is not None:
        with torch.no_grad():
            model.load_state_dict(start.state_dict())
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    path = folder / name
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tokenizer() -> Any:
    vocabulary = {word: k for k, word in enumerate([*SPECIALS, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def labelled_file(folder: Path) -> Path:
    path = folder / "labelled.jsonl"
    rows = [{"text": line, "label": k % 3} for k, line in enumerate(filter(None, LINES))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_file(folder: Path) -> Path:
    path = folder / "tokens.jsonl"
    rows: list[Any] = [[5, 6, 7, 8], {"input_ids": [9, 10, 11], "labels": [-100, 10, 11]}, [5, 5, 12, 13, 14]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
