"""Recipes with modules: which tensors each of them has, found by the beginnings of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.rows import Row, Rows, some
from tvfast.errors import RecipeError
from tvfast.recipe import Module, Recipe

_REST = "default"
"""What mergekit calls the module of everything that is in no other one."""


class ModuleRows:
    """Pairs tensors of every module by name, as `Rows` does those of whole models.

    Raises:
        RecipeError: tensors of a model are in no module, a module has none, or its name tells nothing.
    """

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.warnings: list[str] = []
        self._recipe = recipe
        self._checkpoints = checkpoints
        self._assigned: dict[str, dict[str, list[str]]] = {}  # by model: names by module
        self._rows = {module.name: self._rows_of(module) for module in recipe.modules}

    def all(self) -> list[Row]:
        """Every row, module after module.

        Raises:
            StateDictError: models have different tensors in a module.
            RecipeError: layers that a model has not, or no layers at all.
        """
        found = []
        for rows in self._rows.values():
            found += rows.all()
            self.warnings += rows.warnings
        return found

    def n_layers(self, module: Module, model: str) -> int | None:
        """How many layers a model has in a module that slices cut; None: nothing is cut, or it has none.

        Raises:
            RecipeError: tensors of the model are in no module, or layers are not to be told.
        """
        names = self._names(module, model) if module.stacked else []
        if not names:
            return None
        return self._cut_down(module, {model: names}).n_layers(model)

    def _rows_of(self, module: Module) -> Rows:
        """
        Raises:
            RecipeError: a model has no tensor of it.
        """
        models = dict.fromkeys(source.model for part in module.slices for source in part.sources)
        names = {model: self._names(module, model) for model in models}
        for model, found in names.items():
            if not found:
                raise self._error(module, f"{model} has no tensor of it; expected one at least")
        return self._cut_down(module, names)

    def _cut_down(self, module: Module, names: Mapping[str, Iterable[str]]) -> Rows:
        """The rows of a module alone; of every model, the tensors of these names."""
        views = {}
        for model, own in names.items():
            checkpoint = self._checkpoints[model]
            views[model] = replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in own})
        alone = replace(self._recipe, slices=module.slices, stacked=module.stacked, modules=())
        return Rows(alone, views, module)

    def _names(self, module: Module, model: str) -> list[str]:
        """Of the tensors of a model in a module."""
        if model not in self._assigned:
            self._assigned[model] = self._assign(self._checkpoints[model])
        return self._assigned[model][module.name]

    def _assign(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        """Names of the tensors of one model, by module."""
        modules = self._recipe.modules
        names = list(checkpoint.tensors)
        owners: dict[str, str] = {}
        rest: list[Module] = []
        for module in modules:
            prefixes = module.prefixes or self._prefixes(module, names, checkpoint)
            if not prefixes:
                rest.append(module)
            for prefix in prefixes:
                other = owners.setdefault(prefix.rstrip("."), module.name)
                if other != module.name:
                    raise self._error(module, f"has the tensors under {prefix} that {other!r} has, too")
        if len(rest) > 1:
            listed = " and ".join(module.name for module in rest)
            raise self._error(
                rest[0],
                f"no tensor of {checkpoint.path} tells by its name which of {listed} it belongs to; expected "
                "one such module at most, which takes what the others have not",
            )
        found: dict[str, list[str]] = {module.name: [] for module in modules}
        lost: list[str] = []
        for name in names:
            owner = _owner(name, owners) or (rest[0].name if rest else None)
            (lost if owner is None else found[owner]).append(name)
        if lost:
            raise self._error(
                modules[0], f"{some(lost)} of {checkpoint.path} in no module; expected every tensor in one"
            )
        if rest and rest[0].name != _REST:
            beginnings = dict.fromkeys(name.partition(".")[0] for name in found[rest[0].name])
            note = (
                f"{rest[0].place}: is taken to have what no other module has: the tensors under "
                f"{', '.join(beginnings)}."
            )
            if note not in self.warnings:
                self.warnings.append(note)
        return found

    def _prefixes(self, module: Module, names: Iterable[str], checkpoint: Checkpoint) -> Sequence[str]:
        """Beginnings of names up to the component that is called as the module; none: nothing is."""
        if module.name == _REST:
            return ()
        inside = f"{module.name}."
        if any(name.startswith(inside) for name in names):
            return (inside,)
        found = {name[: name.index(f".{inside}") + 1] + inside for name in names if f".{inside}" in name}
        outer = [one for one in found if not any(one != other and one.startswith(other) for other in found)]
        if len(outer) > 1:
            raise self._error(
                module,
                f"{checkpoint.path} has tensors under {', '.join(sorted(outer))}; expected one beginning",
            )
        return outer

    def _error(self, module: Module, found: str) -> RecipeError:
        return RecipeError(
            f"{self._recipe.where}: {module.place}: {found}. Tell how the names of its tensors begin: "
            f"`tvfast: {{modules: {{{module.name}: [...]}}}}`."
        )


def rows_of(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Rows | ModuleRows:
    """What pairs the tensors of a recipe."""
    return ModuleRows(recipe, checkpoints) if recipe.modules else Rows(recipe, checkpoints)


def _owner(name: str, owners: Mapping[str, str]) -> str | None:
    """The module that has the longest beginning of a name, in whole components."""
    end = len(name)
    while end > 0:
        owner = owners.get(name[:end])
        if owner is not None:
            return owner
        end = name.rfind(".", 0, end)
    return None
