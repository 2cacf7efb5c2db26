"""How a recipe names a model."""

from __future__ import annotations

from collections.abc import Callable

from tvfast.recipe.document import Value

Ignore = Callable[[str, str], None]

_WHAT = "a model: a path, org/name, org/name@revision, base+adapter, or {model: {path, revision}, lora}"


class References:
    """Reads names of models, and remembers those that are a base with an adapter.

    Args:
        ignore: is told (key, reason) of what has no effect.

    Attributes:
        adapters: name of the model -> (path of the base, path of the adapter).
    """

    def __init__(self, ignore: Ignore) -> None:
        self._ignore = ignore
        self._plain: set[str] = set()
        self.adapters: dict[str, tuple[str, str]] = {}

    def read(self, value: Value) -> str:
        """The path or hub id of a model; a revision follows an `@`, an adapter a `+`.

        Args:
            value: a text, or mergekit's mapping `{model: {path, revision}, lora, override_architecture}`.

        Raises:
            RecipeError: it names no model.
        """
        base, adapter = self._parts(value)
        name = base if adapter is None else f"{base}+{adapter}"
        if adapter is None:
            self._plain.add(name)
        else:
            self.adapters[name] = (base, adapter)
        if name in self._plain and name in self.adapters:
            raise value.error(f"{name!r} names a path here and a base with an adapter elsewhere; rename one.")
        return name

    def _parts(self, value: Value) -> tuple[str, str | None]:
        if isinstance(value.plain, dict):
            return self._of_mapping(value)
        text = value.text(_WHAT)
        base, plus, adapter = text.partition("+")
        if not plus:
            return text, None
        if not base or not adapter or "+" in adapter:
            raise value.error(
                f"{value.found} is no base+adapter; expected one '+' between two paths. If a '+' belongs "
                "to a path, write {model: {path: ...}, lora: {path: ...}}."
            )
        return base, adapter

    def _of_mapping(self, value: Value) -> tuple[str, str | None]:
        found = value.mapping(("model", "lora", "override_architecture"))
        if "override_architecture" in found and found["override_architecture"].plain is not None:
            self._ignore(
                "override_architecture", "has no effect: tensors are found by their names in the files"
            )
        if "model" not in found:
            raise value.error("has no model; expected {model: {path: ...}}.")
        adapter = found.get("lora")
        path = _path(found["model"], _WHAT)
        if adapter is None or adapter.plain is None:
            return path, None
        return path, _path(adapter, "an adapter: a path, org/name, or {path, revision}")


def _path(value: Value, what: str) -> str:
    """A path with its revision."""
    if not isinstance(value.plain, dict):
        return value.text(what)
    parts = value.mapping(("path", "revision"))
    if "path" not in parts:
        raise value.error("has no path; expected {path: ...}.")
    path = parts["path"].text("a path or org/name")
    if "revision" in parts and parts["revision"].plain is not None:
        return f"{path}@{parts['revision'].text('the name of a revision')}"
    return path
