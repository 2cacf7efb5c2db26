"""What a recipe says, checked, and independent of how it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tvfast.methods import METHODS
from tvfast.recipe.settings import Setting
from tvfast.recipe.tokenizer import Tokenizer

Settings = Mapping[str, Setting]
"""Parameters by their names in the recipe."""

SHARD_BYTES = 5_000_000_000
"""mergekit's default size of an output file."""


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a slice.

    Attributes:
        model: path or hub id of a checkpoint, as written.
        layers: first and one past the last; None: all.
        parameters: of this input only.
        place: where the recipe names it.
        stats: path of its statistics file; None: it has none.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    place: str
    stats: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output and what they are merged from; a recipe with `models` is one slice of all layers.

    Attributes:
        sources: every input, in order, the base among them where the method takes it.
        base: position of the base in `sources`; None: it is none of them.
        instruct: position of the instruct model in `sources`; None: the method compares with none.
        parameters: of this slice.
        place: where the recipe has it.
        module: parameters of the module that it belongs to.
    """

    sources: tuple[Source, ...]
    base: int | None
    parameters: Settings
    place: str
    instruct: int | None = None
    module: Settings = field(default_factory=dict)

    @property
    def n_layers(self) -> int | None:
        """Layers of the output; None: all of the models."""
        layers = self.sources[0].layers
        return None if layers is None else layers[1] - layers[0]

    @property
    def reference(self) -> int:
        """Position of the source whose names, order and types the output takes: the base, or the first."""
        return 0 if self.base is None else self.base


@dataclass(frozen=True, slots=True)
class Module:
    """A component of the models that is merged by itself, such as the vision tower.

    Attributes:
        name: in the recipe.
        prefixes: beginnings of the names of its tensors; none: they are found by the module's name.
        slices: at least one; several only if `stacked`.
        stacked: given as `slices`, so layers are renumbered.
        place: where the recipe has it.
    """

    name: str
    prefixes: tuple[str, ...]
    slices: tuple[Slice, ...]
    stacked: bool
    place: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    Attributes:
        where: the file, or what stands for it in messages.
        text: verbatim; of a mapping, its JSON.
        method: name of a registered method.
        dialect: whose reading of it.
        base_model: as written; also where it is no operand.
        slices: at least one; several only if `stacked`, or those of all modules.
        stacked: given as `slices`, so layers are renumbered.
        parameters: of the whole recipe.
        dtype, out_dtype: storage types by their safetensors names; None: not given.
        tokenizer: whose vocabulary the output takes; None: not given.
        chat_template: "auto", a name or a Jinja template; None: not given.
        shard_bytes: most bytes of tensors in an output file.
        seed: of random draws and tie hashes.
        tie: rule for entries equal to a threshold; None: the dialect's.
        words: parameters of the method that are words, by name; absent: its defaults.
        on_missing_stats: what a tensor without statistics means where the method needs them.
        nonfinite: what a NaN or an infinity in an input means.
        on_missing: what a tensor means that the base has and another model has not.
        copy_tokenizer: whether tokenizer files are written where there is no `tokenizer`.
        card: whether README.md and mergekit_config.yml are written.
        name: under which other recipes of the file use the result; None: it has none.
        stages: recipes whose results this one needs, directly or not, in the order in which they are merged;
            models of their names are their results.
        warnings: what was ignored.
        adapters: models that are a base with an adapter added: (path of the base, path of the adapter).
        lora_merge_dtype: what these sums are rounded to; None: the type of the base's tensor.
        modules: components that are merged by themselves; none: models are merged as they are.
        out_format: of the output: safetensors, or a distributed checkpoint of torch.
        on_missing_scale: what 8-bit codes without factors mean: an error, or numbers as they are.
        instruct: the instruct model of the base, as written; None: the method compares with none.
    """

    where: str
    text: str
    method: str
    dialect: str
    base_model: str | None
    slices: tuple[Slice, ...]
    stacked: bool
    parameters: Settings
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    shard_bytes: int = SHARD_BYTES
    seed: int = 0
    tie: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    on_missing_stats: Literal["error", "plain"] = "error"
    nonfinite: Literal["error", "propagate"] = "error"
    on_missing: Literal["error", "base"] = "error"
    copy_tokenizer: bool = True
    card: bool = True
    name: str | None = None
    stages: tuple[Recipe, ...] = ()
    warnings: tuple[str, ...] = ()
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    lora_merge_dtype: str | None = None
    on_missing_scale: Literal["error", "one"] = "error"
    instruct: str | None = None
    out_format: Literal["safetensors", "dcp"] = "safetensors"
    modules: tuple[Module, ...] = ()

    @property
    def reads_base(self) -> bool:
        """Whether the method has the base as an operand: where it is optional, the recipe decides."""
        info = METHODS[self.method]
        named = self.base_model is not None or any(part.base is not None for part in self.slices)
        return info.needs_base and (named or not info.optional_base)

    @property
    def output_dtype(self) -> str | None:
        """What every merged tensor is stored as; None: as the base, or the first model, stores it."""
        return self.out_dtype or self.dtype

    @property
    def scope(self) -> str | None:
        """What is ranked together; None: the method's or dialect's own choice."""
        return self.words.get("scope")

    def statistics_paths(self) -> tuple[str, ...]:
        """Every statistics file, once."""
        found = [source.stats for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys(path for path in found if path is not None))

    @property
    def donor(self) -> str:
        """The model whose configuration the output takes: the base, or the first input.

        Where task vectors are added to an instruct model, that one.
        """
        if self.instruct is not None and self.words.get("target", "instruct") == "instruct":
            return self.instruct
        return self.base_model or self.slices[0].sources[self.slices[0].reference].model

    def parts_of(self, model: str) -> tuple[str, str | None]:
        """Path of a model's checkpoint, and of the adapter that is added to it; None: there is none."""
        return self.adapters.get(model, (model, None))

    def uses(self) -> tuple[str, ...]:
        """Every checkpoint that it names, that of the tokenizer too; an adapter's base without it."""
        more = () if self.tokenizer is None else (self.tokenizer.source,)
        return tuple(dict.fromkeys(self.parts_of(model)[0] for model in (*self.model_paths(), *more)))

    def model_paths(self) -> tuple[str, ...]:
        """Every checkpoint that is needed, once, the base first."""
        sources = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys([self.donor, *sources]))
