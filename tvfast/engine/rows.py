"""Which tensors of which files meet in each tensor of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.engine.joining import Body, check_joined
from tvfast.engine.layers import (
    LayerCount,
    gradient_stacks,
    is_first,
    layer_count,
    place,
    position,
    share,
    stacks,
)
from tvfast.errors import RecipeError, StateDictError
from tvfast.recipe import Module, Recipe, Slice

SHOWN = 4  # names in a message
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the output.

    Attributes:
        name: in the output.
        inputs: of each source of the slice, in order; None where a model has no such tensor and the recipe
            says that the base's is to be copied.
        part: the slice that it belongs to.
        t: position of its layer, from 0 to 1.
    """

    name: str
    inputs: tuple[Stored | None, ...]
    part: Slice
    t: float

    @property
    def reference(self) -> Stored:
        """The base's tensor, or the first model's."""
        found = self.inputs[self.part.reference]
        assert found is not None  # names come from the reference
        return found


class Rows:
    """Pairs tensors by name; what does not pair is refused, or noted in `warnings`.

    Args:
        module: what recipe and checkpoints are cut down to; None: they are whole.
    """

    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], module: Module | None = None
    ) -> None:
        self._module = module
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.warnings: list[str] = []
        self._mains: dict[str, tuple[str, int]] = {}
        self._by_layer: dict[str, dict[int, list[str]]] = {}

    def all(self) -> list[Row]:
        """Every row in the order of the output: as in the files of the base, or of the first model.

        With slices: what comes before the layers, the layers, what comes after them.

        Raises:
            StateDictError: models have different tensors.
            RecipeError: layers that a model has not, or no layers at all.
        """
        found = list(self._stacked() if self.recipe.stacked else self._whole())
        if self._module is None:  # components may well differ
            self._note_architectures()
        return found

    def n_layers(self, model: str) -> int | None:
        """How many layers slices of a model are cut from; None: nothing is cut."""
        return self._main(self.checkpoints[model])[1] if self.recipe.stacked else None

    # -- whole models -----------------------------------------------------------------------------------

    def _whole(self) -> Iterator[Row]:
        part = self.recipe.slices[0]
        reference = self._checkpoint(part, part.reference)
        found = gradient_stacks(reference.tensors, reference.config)
        names = list(reference.tensors)
        self._compare(part, [list(self._checkpoint(part, k).tensors) for k in range(len(part.sources))], "")
        for name in names:
            yield self._row(part, name, [name] * len(part.sources), position(name, found))

    # -- slices of layers -------------------------------------------------------------------------------

    def _stacked(self) -> Iterator[Row]:
        first, last = self.recipe.slices[0], self.recipe.slices[-1]
        bodies = {}
        for part in self.recipe.slices:
            model = part.sources[part.reference].model
            if model not in bodies:
                bodies[model] = self._body(model)
                check_joined(self.recipe, next(iter(bodies.values())), bodies[model])
        yield from self._outside(first, before=True)
        offset = 0
        for part in self.recipe.slices:
            n_layers = part.n_layers
            assert n_layers is not None
            for k in range(n_layers):
                yield from self._layer(part, k, n_layers, offset + k)
            offset += n_layers
        yield from self._outside(last, before=False)

    def _body(self, model: str) -> Body:
        checkpoint = self.checkpoints[model]
        main, _ = self._main(checkpoint)
        inside: dict[str, list[Stored]] = {}
        for layer, suffixes in self._layers(checkpoint, main).items():
            for suffix in suffixes:
                inside.setdefault(suffix, []).append(checkpoint.tensors[f"{main}{layer}.{suffix}"])
        outside = {n: stored for n, stored in checkpoint.tensors.items() if not _inside(n, main)}
        return Body(model, outside, inside)

    def _outside(self, part: Slice, *, before: bool) -> Iterator[Row]:
        """What is in no layer: embeddings from the first slice, norm and head from the last."""
        names = []
        for k in range(len(part.sources)):
            checkpoint = self._checkpoint(part, k)
            main, _ = self._main(checkpoint)
            found = stacks(checkpoint.tensors)
            names.append(
                [
                    name
                    for name in checkpoint.tensors
                    if not _inside(name, main) and is_first(name, main, found) == before
                ]
            )
        self._compare(part, names, " outside of the layers")
        for name in names[part.reference]:
            yield self._row(part, name, [name] * len(part.sources), 0.0)

    def _layer(self, part: Slice, k: int, n_layers: int, output: int) -> Iterator[Row]:
        prefixes, suffixes = [], []
        for i, source in enumerate(part.sources):
            assert source.layers is not None
            checkpoint = self._checkpoint(part, i)
            prefix, n_layers_there = self._main(checkpoint)
            if source.layers[1] > n_layers_there:
                raise RecipeError(
                    f"{self.recipe.where}: {source.place}.layer_range: is {list(source.layers)}, but "
                    f"{source.model} has {n_layers_there} layers from {prefix}0; "
                    "expected a range inside them."
                )
            layer = source.layers[0] + k
            prefixes.append(f"{prefix}{layer}.")
            suffixes.append(self._layers(checkpoint, prefix)[layer])
        self._compare(part, suffixes, f" of output layer {output}")
        prefix, _ = self._main(self._checkpoint(part, part.reference))
        for suffix in suffixes[part.reference]:
            names = [prefix_k + suffix for prefix_k in prefixes]
            yield self._row(part, f"{prefix}{output}.{suffix}", names, share(k, n_layers))

    def _main(self, checkpoint: Checkpoint) -> tuple[str, int]:
        """Prefix and length of the stack that slices are cut from.

        Raises:
            RecipeError: none, or several.
        """
        known = self._mains.get(checkpoint.path)
        if known is None:
            found = stacks(checkpoint.tensors)
            declared = layer_count(checkpoint.config)
            fitting = found
            if self._module is not None:  # the configuration may count the layers of another one
                declared = None
                fitting = gradient_stacks(checkpoint.tensors, checkpoint.config) if len(found) > 1 else found
            elif declared is not None:
                fitting = {prefix: n for prefix, n in found.items() if n == declared.n_layers}
            if len(fitting) != 1:
                raise self._no_main(checkpoint, found, declared)
            known = self._mains[checkpoint.path] = next(iter(fitting.items()))
        return known

    def _no_main(
        self, checkpoint: Checkpoint, found: Mapping[str, int], declared: LayerCount | None
    ) -> RecipeError:
        listed = ", ".join(f"{n} of {prefix}*" for prefix, n in list(found.items())[:SHOWN]) or "none"
        said = "one stack"
        if declared is not None:
            said = f"one stack of {declared.n_layers}, which config.json gives as {'.'.join(declared.keys)}"
        place = "slices" if self._module is None else f"{self._module.place}.slices"
        return RecipeError(
            f"{self.recipe.where}: {place}: cannot tell which tensors of {checkpoint.path} are its layers. "
            f"Found: {listed}; expected {said}. To merge the whole model, use models instead of slices."
        )

    def _layers(self, checkpoint: Checkpoint, prefix: str) -> dict[int, list[str]]:
        """Suffixes by layer, in the order of the files."""
        found = self._by_layer.get(checkpoint.path)
        if found is None:
            found = self._by_layer[checkpoint.path] = {}
            for name in checkpoint.tensors:
                placed = place(name)
                if placed is not None and placed.prefix == prefix:
                    found.setdefault(placed.layer, []).append(placed.suffix)
        return found

    # -- both -------------------------------------------------------------------------------------------

    def _checkpoint(self, part: Slice, source: int) -> Checkpoint:
        return self.checkpoints[part.sources[source].model]

    def _row(self, part: Slice, output: str, names: Sequence[str], t: float) -> Row:
        inputs = tuple(self._checkpoint(part, k).tensors.get(name) for k, name in enumerate(names))
        return Row(output, inputs, part, t)

    def _compare(self, part: Slice, names: Sequence[Sequence[str]], where: str) -> None:
        """Raise, or note, where sources have other tensors than the reference."""
        expected = set(names[part.reference])
        for k, found in enumerate(names):
            if k == part.reference or (len(found) == len(expected) and expected.issuperset(found)):
                continue
            missing = [name for name in names[part.reference] if name not in set(found)]
            extra = [name for name in found if name not in expected]
            if self.recipe.on_missing == "error":
                raise self._unpaired(part, k, missing, extra, where)
            self._note(part, k, missing, extra, where)

    def _unpaired(
        self, part: Slice, source: int, missing: list[str], extra: list[str], where: str
    ) -> StateDictError:
        other, reference = part.sources[source], part.sources[part.reference]
        found = [
            f"{verb} {some(names)}" for verb, names in (("lacks", missing), ("has besides", extra)) if names
        ]
        message = (
            f"{self.recipe.where}: {other.place} ({other.model}) and {reference.place} ({reference.model}) "
            f"have different tensors{where}: {other.model} {'; it '.join(found)}. "
        )
        if [*missing, *extra] == [_HEAD]:
            tied = other if missing else reference
            config = self.checkpoints[tied.model].config or {}
            if config.get("tie_word_embeddings"):
                message += f"{tied.model} ties its head to its embeddings (tie_word_embeddings). "
        kinds = [self._architecture(model) for model in (other.model, reference.model)]
        if None not in kinds and kinds[0] != kinds[1]:
            message += f"They are of two architectures, {kinds[0]} and {kinds[1]}. "
        return StateDictError(
            message + "Expected equal sets of names; `tvfast: {on_missing: base}` takes those of "
            f"{reference.model} and copies what another model lacks."
        )

    def _note_architectures(self) -> None:
        """Configurations may call models differently whose tensors have equal names."""
        sources = [source for part in self.recipe.slices for source in part.sources]
        reference = self.recipe.slices[0].sources[self.recipe.slices[0].reference].model
        own = self._architecture(reference)
        for model in dict.fromkeys(source.model for source in sources):
            other = self._architecture(model)
            if None not in (own, other) and own != other:
                self.warnings.append(
                    f"{model} is of architecture {other}, {reference} of {own}: they are merged by the "
                    "names of their tensors."
                )

    def _architecture(self, model: str) -> str | None:
        """What `config.json` calls the class of a model; None: nothing."""
        named = (self.checkpoints[model].config or {}).get("architectures")
        return str(named[0]) if isinstance(named, list) and named else None

    def _note(self, part: Slice, source: int, missing: list[str], extra: list[str], where: str) -> None:
        model, reference = part.sources[source].model, part.sources[part.reference].model
        if missing:
            self.warnings.append(f"{model} lacks {some(missing)}{where}: copied from {reference}.")
        if extra:
            self.warnings.append(f"{model} has {some(extra)}{where} and {reference} has not: left out.")


def _inside(name: str, main: str) -> bool:
    placed = place(name)
    return placed is not None and placed.prefix == main


def some(names: Sequence[str]) -> str:
    """A few names and how many there are."""
    listed = ", ".join(names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({listed}{more})"
