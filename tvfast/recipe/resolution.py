"""From a recipe's parameters to the method of one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tvfast.errors import ArgumentError, RecipeError
from tvfast.methods import METHODS, Method, make_method
from tvfast.recipe.keys import Key, method_keys
from tvfast.recipe.recipe import Recipe, Settings, Slice, Source

Arguments = tuple[tuple[str, Any], ...]


class Resolver:
    """Makes methods; equal numbers give the identical object, so that tensors can be merged in batches.

    A parameter is looked for at the source, at the slice, at its module, at the recipe; a level without a
    filter that fits is passed over. What every model has of its own filters on the name of the input tensor,
    the rest on that of the output.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self._fixed = {"seed": seed, "tie": recipe.tie, "dialect": recipe.dialect, **recipe.words}
        self._keys = tuple(method_keys(recipe.method, recipe.dialect).values())
        self._needs_base = recipe.reads_base
        if METHODS[recipe.method].optional_base:
            self._fixed["task_vectors"] = recipe.reads_base
        self._methods: dict[Arguments, Method] = {}
        self._constant: dict[str, Method | None] = {}  # by place of the slice; None: not constant

    def models(self, part: Slice) -> list[int]:
        """Positions of the sources that are θ_k; base and instruct model are none of them."""
        others = {part.instruct, part.base if self._needs_base else None}
        return [k for k in range(len(part.sources)) if k not in others]

    def operands(self, part: Slice) -> list[int]:
        """Positions of what the method reads beside the base: its models, and the instruct model last."""
        return self.models(part) + ([] if part.instruct is None else [part.instruct])

    def is_constant(self, part: Slice) -> bool:
        """Whether all tensors of a slice have the same numbers."""
        shared = (part.parameters, part.module, self.recipe.parameters)
        return all(
            setting.constant
            for settings in (*shared, *(source.parameters for source in part.sources))
            for setting in settings.values()
        )

    def method(self, part: Slice, names: Sequence[str], output: str, t: float) -> Method:
        """The method of one tensor.

        Args:
            part: the slice that the tensor is in.
            names: of the tensor in each source.
            output: its name in the output.
            t: position of its layer in the slice, from 0 to 1; 0 outside of layers.

        Raises:
            RecipeError: a required number is missing for this tensor, or numbers do not fit each other.
        """
        if part.place not in self._constant:
            self._constant[part.place] = None
            if self.is_constant(part):
                self._constant[part.place] = self.method(part, names, output, t)
        known = self._constant[part.place]
        if known is not None:
            return known
        arguments = tuple(self._arguments(part, names, output, t))
        method = self._methods.get(arguments)
        if method is None:
            try:
                method = make_method(self.recipe.method, **dict(arguments), **self._fixed)
                method.check_models(len(self.models(part)))
            except ArgumentError as error:
                place = f" (tensor {output!r})" if output else ""
                raise RecipeError(f"{self.recipe.where}: {part.place}{place}: {error}") from None
            self._methods[arguments] = method
        return method

    def _arguments(
        self, part: Slice, names: Sequence[str], output: str, t: float
    ) -> Iterator[tuple[str, Any]]:
        levels = (part.parameters, part.module, self.recipe.parameters)
        for key in self._keys:
            if not key.per_model:
                value = _lookup(key, levels, output, t)
                if value is not None:
                    yield key.keyword, value
                elif key.required:
                    raise self._missing(key, None, output)
                continue
            values = []
            for k in self.models(part):
                source = part.sources[k]
                value = _lookup(key, (source.parameters, *levels), names[k], t)
                if value is None and key.required:
                    raise self._missing(key, source, names[k])
                values.append(value)
            if any(value is not None for value in values):
                if key.default is None and None in values:
                    k = self.models(part)[values.index(None)]
                    raise self._missing(key, part.sources[k], names[k])
                yield key.keyword, tuple(key.default if value is None else value for value in values)

    def _missing(self, key: Key, source: Source | None, tensor: str) -> RecipeError:
        place = "parameters" if source is None else f"{source.place} ({source.model})"
        return RecipeError(
            f"{self.recipe.where}: {place}: {key.name} has no value for tensor {tensor!r}: no filter fits, "
            f"and method {self.recipe.method!r} needs one. End the list with an entry that has no filter."
        )


def _lookup(key: Key, levels: Sequence[Settings], name: str, t: float) -> float | None:
    for settings in levels:
        setting = settings.get(key.name)
        if setting is not None:
            value = setting.at(name, t)
            if value is not None:
                return value
    return None
