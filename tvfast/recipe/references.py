"""How a recipe names a model."""

from __future__ import annotations

from collections.abc import Callable

from tvfast.recipe.document import Value

Ignore = Callable[[str, str], None]

_WHAT = "a model: a path, org/name, org/name@revision, or {model: {path, revision}}"


def read_reference(value: Value, ignore: Ignore) -> str:
    """The path or hub id of a model; a revision follows an `@`.

    Args:
        value: a text, or mergekit's mapping `{model: {path, revision}, lora, override_architecture}`.
        ignore: is told (key, reason) of what has no effect.

    Raises:
        RecipeError: it names no model, or an adapter.
    """
    if isinstance(value.plain, dict):
        return _from_mapping(value, ignore)
    text = value.text(_WHAT)
    if "+" in text:
        raise value.error(
            f"{value.found} names an adapter after the '+'; adapters are not supported yet. Merge it into "
            "its base first; or if the '+' belongs to the path, write {model: {path: ...}}."
        )
    return text


def _from_mapping(value: Value, ignore: Ignore) -> str:
    found = value.mapping(("model", "lora", "override_architecture"))
    if "lora" in found and found["lora"].plain is not None:
        raise found["lora"].error("adapters are not supported yet. Merge it into its base first.")
    if "override_architecture" in found and found["override_architecture"].plain is not None:
        ignore("override_architecture", "has no effect: tensors are found by their names in the files")
    if "model" not in found:
        raise value.error("has no model; expected {model: {path: ...}}.")
    model = found["model"]
    if not isinstance(model.plain, dict):
        return model.text(_WHAT)
    parts = model.mapping(("path", "revision"))
    if "path" not in parts:
        raise model.error("has no path; expected {path: ...}.")
    path = parts["path"].text("a path or org/name")
    if "revision" in parts and parts["revision"].plain is not None:
        return f"{path}@{parts['revision'].text('the name of a revision')}"
    return path
