"""Tokenizers that have no `tokenizer.json`, through transformers; imported only where one is needed."""

from __future__ import annotations

import json
from typing import Any

from tvfast.errors import RecipeError


def tokenizer_document(directory: str, where: str) -> dict[str, Any]:
    """What `tokenizer.json` would hold of the tokenizer in a directory.

    Args:
        where: the recipe and its key.

    Raises:
        RecipeError: transformers is not installed, or cannot convert this tokenizer.
    """
    what = f"{where}: the tokenizer in {directory} has no tokenizer.json, which joining vocabularies needs"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RecipeError(
            f"{what}; making one takes the package transformers ({error}). Install it, or save the tokenizer "
            "with save_pretrained where it is."
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True)
        document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # of whatever library knows the format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{what}; transformers cannot make one: {reason[:200]}. Save the tokenizer in that form."
        ) from None
    return document
