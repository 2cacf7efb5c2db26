"""What lies beside the weights of a model directory: configuration, tokenizer, chat template, model card."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tvfast.checkpoint.files import open_regular
from tvfast.checkpoint.locating import locate
from tvfast.errors import CheckpointError, RecipeError
from tvfast.methods import method_info

if TYPE_CHECKING:
    from tvfast.engine.binding import Binding
    from tvfast.recipe import Recipe

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.bpe",
    "chat_template.jinja",
    "chat_template.json",
)
"""Copied from the checkpoint that the tokenizer is taken from."""

DONOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Copied from the checkpoint that the configuration is taken from."""

MAX_FILE_BYTES = 512 * 1000**2
"""A companion file that is larger is no companion; the largest real ones have some tens of megabytes."""

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def companions(recipe: Recipe, binding: Binding) -> dict[str, bytes]:
    """Every file of the output that holds no weights, by name.

    Args:
        recipe: its text goes along verbatim.
        binding: says whose files are copied, and brings the patched config.

    Returns:
        `config.json`, generation and processor configs, tokenizer files, chat template, `README.md` and
        `mergekit_config.yml`; of these, what the inputs have. Equal inputs give equal bytes: no time, host or
        path goes in but those that the recipe itself states.

    Raises:
        CheckpointError: a file to copy is not a regular file, or is larger than `MAX_FILE_BYTES`; or it is
            read for its chat template and is no JSON object.
        RecipeError: `chat_template` is neither "auto" nor a template.
    """
    files = _copied(binding.donor, DONOR_FILES)
    if binding.config is not None:
        if "auto_map" in binding.config:  # the model's own code; without it, the output does not load
            files |= _copied(binding.donor, _named(binding.donor, ".py"))
        files["config.json"] = _json(binding.config)
    if binding.tokenizer is not None:
        files |= _copied(binding.tokenizer, (*TOKENIZER_FILES, *_named(binding.tokenizer, ".tiktoken")))
        files |= binding.tokenizer_files
        if b'"auto_map"' in files.get("tokenizer_config.json", b""):
            files |= _copied(binding.tokenizer, _named(binding.tokenizer, ".py"))
    if recipe.chat_template is not None:
        files |= _with_template(files, _template(recipe.chat_template, _directories(recipe, binding)))
    if recipe.card:
        files["README.md"] = card(recipe).encode()
        files["mergekit_config.yml"] = recipe.text.encode()
    return files


def _directories(recipe: Recipe, binding: Binding) -> list[str]:
    """Where the companion files of each model are: those of its base, if an adapter is added to it."""
    paths = dict.fromkeys(recipe.parts_of(model)[0] for model in recipe.model_paths())
    return [binding.directories.get(path, path) for path in paths]


def card(recipe: Recipe) -> str:
    """The model card: what was merged, by which formula, and the recipe."""
    info = method_info(recipe.method)
    paths = recipe.model_paths()
    names = [path for path in paths if _HUB_NAME.fullmatch(path)]
    listed = [f"base_model:{'' if names else ' []'}", *(f"- {json.dumps(name)}" for name in names)]
    models = [f"* {_code(path)}{' (base)' if path == recipe.base_model else ''}" for path in paths]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe.text)), default=0))
    return "\n".join(
        [
            "---",
            *listed,
            "library_name: transformers",
            "tags:",
            "- tvfast",
            "- merge",
            "---",
            "",
            "# Merge",
            "",
            f"A merge of {len(paths)} checkpoints by the method `{info.name}`:",
            "",
            f"    {info.formula}",
            "",
            f"Source of the method: {info.source}.",
            "",
            "## Models",
            "",
            *models,
            "",
            "## Recipe",
            "",
            f"{fence}yaml",
            recipe.text.rstrip("\n"),
            fence,
            "",
        ]
    )


def _code(text: str) -> str:
    """Inline code that holds backticks, too."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _copied(path: str, names: Iterable[str]) -> dict[str, bytes]:
    """Those of the named files that lie beside a checkpoint; beside one that is a single file, none."""
    directory = _directory(path)
    if directory is None:
        return {}
    found = {name: os.path.join(directory, name) for name in names}
    return {name: _read(file) for name, file in found.items() if os.path.lexists(file)}


def _named(path: str, suffix: str) -> list[str]:
    directory = _directory(path)
    return [] if directory is None else sorted(n for n in os.listdir(directory) if n.endswith(suffix))


def _directory(path: str) -> str | None:
    return path if os.path.isdir(path) else locate(path).directory


def _read(path: str) -> bytes:
    """The content of a regular file.

    Raises:
        CheckpointError: something else, or too large.
    """
    with open_regular(path) as file:
        if file.n_bytes > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path}: has {file.n_bytes} bytes; expected at most {MAX_FILE_BYTES} in a file that is "
                "copied beside the merged weights. Remove it or replace it."
            )
        return file.read(file.n_bytes, 0)


def _with_template(files: Mapping[str, bytes], template: str | None) -> dict[str, bytes]:
    """The files that change for a chat template, wherever a reader may look for it."""
    if template is None:
        return {}
    changed = {"chat_template.jinja": template.encode()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in files:
            content = _object(files[name], name)
            if "chat_template" in content:
                changed[name] = _json({**content, "chat_template": template})
    return changed


def _template(wanted: str, paths: Iterable[str]) -> str | None:
    """A template itself, or for "auto" the most common one of the inputs, the first of several.

    Raises:
        RecipeError: `wanted` is a word, not a template.
    """
    if wanted != "auto":
        if "{" in wanted:
            return wanted
        raise RecipeError(
            f"chat_template is {wanted!r}; expected auto, which takes the most common one of the inputs, or "
            "a Jinja template itself. There are no built-in names: paste the template."
        )
    found = [template for template in map(_template_of, paths) if template is not None]
    return Counter(found).most_common(1)[0][0] if found else None


def _template_of(path: str) -> str | None:
    """The chat template of a checkpoint, from the file of its own or a configuration; None if it has none."""
    files = _copied(path, ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
    for name, content in files.items():
        where = os.path.join(path, name)
        if name.endswith(".jinja"):
            return _text(content, where)
        value = _object(content, where).get("chat_template")
        if isinstance(value, list):  # several by name
            named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}: is no UTF-8 text (byte {error.start}); expected a Jinja template. Restore or remove "
            "it."
        ) from None


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no JSON ({error}); restore or remove it.") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where}: holds a JSON {type(found).__name__}; expected an object. Restore or remove it."
        )
    return found
