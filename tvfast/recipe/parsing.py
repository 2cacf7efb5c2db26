"""A document becomes a recipe: keys known, values in range, counts right, before a model is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

from tvfast.errors import ArgumentError, RecipeError, UnknownNameError
from tvfast.methods import METHODS, MethodInfo, make_method
from tvfast.methods.base import TIES
from tvfast.recipe.document import Value, nearest, shortened
from tvfast.recipe.keys import BASE_IS_AN_INPUT, PEER_KEYS, WORDS, Key, method_keys
from tvfast.recipe.quantities import beginnings, dtype, layer_range, n_bytes, seed
from tvfast.recipe.recipe import SHARD_BYTES, Module, Recipe, Settings, Slice, Source
from tvfast.recipe.references import References
from tvfast.recipe.resolution import Resolver
from tvfast.recipe.settings import read_setting
from tvfast.recipe.tokenizer import read_tokenizer

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "out_shard_size",
    "name",
    "out_path",
    "tvfast",
)
_OWN = (
    "dialect",
    "seed",
    "tie",
    *WORDS,
    "out_shard_size",
    "nonfinite",
    "on_missing",
    "stats",
    "on_missing_stats",
    "on_missing_scale",
    "lora_merge_dtype",
    "instruct",
    "out_format",
    "modules",
)
_MAX_PROBED = 1000  # values of one setting that are tried one by one

Word = TypeVar("Word", bound=str)
Level = Literal["recipe", "slice", "source", "base", "instruct model"]


def read_recipe(document: Value, text: str, *, name: str | None = None) -> Recipe:
    """The recipe that a document holds.

    Args:
        text: what the recipe's card shows.
        name: of a recipe beside others.

    Raises:
        RecipeError: it is none.
        UnknownNameError: method or dialect do not exist.
    """
    return _Reader(document).recipe(text, name)


class _Reader:
    """State of one reading: the method, its parameters, and what has been ignored so far."""

    def __init__(self, document: Value) -> None:
        what = "a mapping with merge_method and models"
        for key, value in document.mapping(what=what).items():
            if key in PEER_KEYS:
                raise value.error("belongs under parameters; expected it there.")
        entries = document.mapping(_TOP, what)
        self.document = document
        self.entries = _given(entries)
        self.own = self.entries["tvfast"].mapping(_OWN) if "tvfast" in self.entries else {}
        stats = self.own.get("stats")
        self.stats: dict[str, Value] = {}
        if stats is not None and stats.plain is not None:
            self.stats = stats.mapping(what="a mapping from models to statistics files")
        self.warnings: dict[str, str] = {}  # by what they are about
        self.references = References(self._ignore)
        self.method = self._method()
        self.info: MethodInfo = METHODS[self.method]
        self.dialect = self._dialect()
        self.keys = method_keys(self.method, self.dialect)
        self.reads_base = self.info.needs_base and (self._names_base() or not self.info.optional_base)
        self.words = self._words()

    def recipe(self, text: str, name: str | None) -> Recipe:
        if name is None:
            for key in ("name", "out_path"):
                if key in self.entries:
                    self._ignore(key, "belongs to recipes of several documents")
        parameters = self._settings(self.entries.get("parameters"), level="recipe")
        base = self._reference("base_model")
        self.instruct = self._instruct(base)
        modules = self._modules(base, parameters)
        stacked = False
        slices = tuple(part for module in modules for part in module.slices)
        if not modules:
            slices, stacked = self._slices(self.entries, self.document, base, parameters)
        known = {source.model for part in slices for source in part.sources}
        for model, value in self.stats.items():
            if model not in known:
                raise value.error(f"{shortened(repr(model))} is no model of this recipe; expected one.")
        recipe = Recipe(
            where=self.document.where,
            text=text,
            method=self.method,
            dialect=self.dialect,
            base_model=base,
            slices=slices,
            stacked=stacked,
            parameters=parameters,
            dtype=dtype(self.entries.get("dtype")),
            out_dtype=dtype(self.entries.get("out_dtype")),
            tokenizer=read_tokenizer(
                self.entries.get("tokenizer"),
                self.entries.get("tokenizer_source"),
                _inputs(slices, base),
                self.references,
            ),
            chat_template=self._chat_template(),
            shard_bytes=self._shard_bytes(),
            seed=seed(self.own.get("seed")),
            tie=self._word("tie", tuple(TIES)),
            words=self.words,
            nonfinite=self._word("nonfinite", _NONFINITE) or "error",
            on_missing=self._word("on_missing", _ON_MISSING) or "error",
            on_missing_stats=self._word("on_missing_stats", _ON_MISSING_STATS) or "error",
            lora_merge_dtype=dtype(self.own.get("lora_merge_dtype")),
            on_missing_scale=self._word("on_missing_scale", _ON_MISSING_SCALE) or "error",
            out_format=self._word("out_format", _OUT_FORMAT) or "safetensors",
            adapters=self.references.adapters,
            instruct=self.instruct,
            modules=modules,
            name=name,
            warnings=tuple(f"{self.document.where}: {warning}" for warning in self.warnings.values()),
        )
        self._check(recipe)
        return recipe

    def _names_base(self) -> bool:
        """Whether a base is named, for the recipe or for a slice."""
        if "base_model" in self.entries:
            return True
        sections = [self.entries]
        if "modules" in self.entries:
            sections += [_given(one.mapping(_MODULE)) for one in self._sections().values()]
        found = [entries["slices"] for entries in sections if "slices" in entries]
        items = [item for slices in found for item in slices.sequence("a list of slices")]
        bases = (item.mapping(what="a mapping with sources").get("base_model") for item in items)
        return any(base is not None and base.plain is not None for base in bases)

    # -- method and parameters --------------------------------------------------------------------------

    def _method(self) -> str:
        value = self.entries.get("merge_method")
        known = sorted(METHODS)
        if value is None:
            raise self.document.error(f"has no merge_method; expected one of {', '.join(known)}.")
        name = value.text("the name of a method")
        if name in METHODS:
            return name
        shown = shortened(repr(name))
        reason = f"method {shown} does not exist;{nearest(name, known).lower()}"
        raise UnknownNameError(str(value.error(f"{reason} expected one of {', '.join(known)}.")))

    def _dialect(self) -> str:
        value = self.own.get("dialect")
        if value is None or value.plain is None:
            return "mergekit" if "mergekit" in self.info.dialects else self.info.dialects[0]
        name = value.text("the name of a dialect")
        if name not in self.info.dialects:
            hint = nearest(name, self.info.dialects).lower()
            message = f"method {self.method!r} has no dialect {shortened(repr(name))};{hint}"
            raise UnknownNameError(
                str(value.error(f"{message} expected one of {', '.join(self.info.dialects)}."))
            )
        return name

    def _settings(self, value: Value | None, *, level: Level) -> Settings:
        """Parameters of one level. What does nothing there is left out, with a warning."""
        if value is None or value.plain is None:
            return {}
        settings = {}
        for name, item in value.mapping(what="a mapping from parameters to values").items():
            key = self.keys.get(name)
            if key is None:
                self._unknown(name, item)
            elif level in ("source", "base", "instruct model") and not key.per_model:
                self._ignore(name, "is one for all models; under a model it has no effect", value.path)
            elif level in ("base", "instruct model"):
                reason = f"of the {level} has no effect with {self.method!r}"
                self._ignore(f"{level} {name}", reason, value.path, name)
            else:
                settings[name] = read_setting(item, flag=key.flag)
                self._check_range(key, settings[name].values, item)
        return settings

    def _unknown(self, name: str, value: Value) -> None:
        known = sorted(PEER_KEYS | set(self.keys))
        if name not in known:
            takes = f"Method {self.method!r} takes {', '.join(self.keys)}."
            raise value.error(f"no such parameter.{nearest(name, known)} {takes}")
        ours = {key.keyword: key.name for key in self.keys.values()}
        hint = f", whose {name!r} is {ours[name]!r} in a recipe" if name in ours else ""
        self._ignore(name, f"has no effect with {self.method!r}{hint}")

    def _ignore(self, topic: str, reason: str, place: str = "", name: str = "") -> None:
        prefix = f"{place}: " if place else ""
        self.warnings.setdefault(topic, f"{prefix}{name or topic!r} {reason}; ignored.")

    def _check_range(self, key: Key, values: Iterable[float], value: Value) -> None:
        """Raise unless the method takes each number; those between two such numbers it takes as well."""
        for number in sorted(values)[:_MAX_PROBED]:
            try:
                make_method(self.method, dialect=self.dialect, **self.words, **{key.keyword: number})
            except ArgumentError as error:
                raise value.error(str(error)) from None

    # -- models -----------------------------------------------------------------------------------------

    def _modules(self, base: str | None, parameters: Settings) -> tuple[Module, ...]:
        """What is merged by itself; nothing: the recipe has no modules."""
        own = self.own.get("modules")
        told = {} if own is None or own.plain is None else own.mapping(what=_WHAT_MODULES)
        if "modules" not in self.entries:
            if told and own is not None:
                raise own.error("belongs to recipes with modules; this one has none. Remove it.")
            return ()
        if "models" in self.entries or "slices" in self.entries:
            raise self.document.error("has modules and models or slices besides; expected one of them.")
        sections = self._sections()
        for name, value in told.items():
            if name not in sections:
                hint = nearest(name, list(sections))
                raise value.error(f"{shortened(repr(name))} is no module of this recipe.{hint} Remove it.")
        modules = []
        for name, section in sections.items():
            found = _given(section.mapping(_MODULE))
            settings = self._settings(found.get("parameters"), level="slice")
            slices, stacked = self._slices(found, section, base, {**parameters, **settings})
            slices = tuple(replace(part, module=settings) for part in slices)
            prefixes = beginnings(told[name]) if name in told else ()
            modules.append(Module(name, prefixes, slices, stacked, section.path))
        return tuple(modules)

    def _sections(self) -> dict[str, Value]:
        """The modules of the recipe by name, one at least."""
        found = self.entries["modules"].mapping(what="a mapping from modules to models or slices")
        if not found:
            raise self.entries["modules"].expected("one module at least")
        return found

    def _slices(
        self, entries: Mapping[str, Value], where: Value, base: str | None, parameters: Settings
    ) -> tuple[tuple[Slice, ...], bool]:
        given = [key for key in ("models", "slices") if key in entries]
        if len(given) != 1:
            found = "has both models and slices" if given else "has neither models nor slices"
            raise where.error(f"{found}; expected one of them.")
        value = entries[given[0]]
        items = value.sequence(f"a list of {given[0]}")
        if not items:
            raise value.expected(f"one of its {given[0]} at least")
        if given[0] == "models":
            return (self._whole(value, items, base, parameters),), False
        return tuple(self._slice(item, base) for item in items), True

    def _whole(self, value: Value, items: list[Value], base: str | None, parameters: Settings) -> Slice:
        sources = [self._source(item, base, stacked=False) for item in items]
        if base is not None and base not in (source.model for source in sources):
            appended = Source(base, None, {}, "base_model")
            if self.reads_base:
                sources.append(appended)
            elif self.method in BASE_IS_AN_INPUT:
                sources.append(appended)
                self.warnings["base_model"] = (
                    f"base_model: is one more input of {self.method!r}, as in mergekit. To leave it out, do "
                    "not name it."
                )
            elif "weight" in self.keys and "weight" in parameters:
                # mergekit makes the base an input here, and so the recipe's weight is one for it, too
                sources.append(appended)
                self.warnings["base_model"] = (
                    f"base_model: is an input of {self.method!r}, too, with the weight that the recipe gives "
                    "to all. To leave it out, give each model its own weight instead."
                )
        if self.instruct is not None and self.instruct not in (source.model for source in sources):
            sources.append(Source(self.instruct, None, {}, "tvfast.instruct"))
        return self._checked(value, sources, base, {})

    def _slice(self, item: Value, base: str | None) -> Slice:
        found = item.mapping(("sources", "base_model", "parameters", "residual_weight"))
        if "residual_weight" in found and found["residual_weight"].plain is not None:
            raise found["residual_weight"].error(
                "has no effect in mergekit, which reads it and adds no residual; so it is refused. Remove it."
            )
        if "sources" not in found:
            raise item.error("has no sources; expected a list of {model, layer_range}.")
        items = found["sources"].sequence("a list of {model, layer_range}")
        if not items:
            raise found["sources"].expected("one source at least")
        if "base_model" in found and found["base_model"].plain is not None:
            base = self.references.read(found["base_model"])
        sources = [self._source(source, base, stacked=True) for source in items]
        lengths = {source.model: source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{shortened(model)}: {n}" for model, n in lengths.items())
            raise found["sources"].error(f"ranges of different lengths, {listed}; expected equal ones.")
        return self._checked(item, sources, base, self._settings(found.get("parameters"), level="slice"))

    def _source(self, item: Value, base: str | None, *, stacked: bool) -> Source:
        known = (
            ("model", "layer_range", "parameters", "stats") if stacked else ("model", "parameters", "stats")
        )
        found = item.mapping(known, "a mapping with model" + (" and layer_range" if stacked else ""))
        for key in known[: 1 + stacked]:
            if key not in found:
                raise item.error(f"has no {key}; expected {', '.join(known)}.")
        model = self.references.read(found["model"])
        level: Level = "base" if self.reads_base and model == base else "source"
        if model == self.instruct:
            level = "instruct model"
        parameters = self._settings(found.get("parameters"), level=level)
        layers = layer_range(found["layer_range"]) if stacked else None
        return Source(model, layers, parameters, item.path, self._stats_of(model, found.get("stats")))

    def _stats_of(self, model: str, value: Value | None) -> str | None:
        """The statistics file of a model: beside it, or under `tvfast: stats:`."""
        entry = self.stats.get(model)
        if value is None or value.plain is None:
            return None if entry is None else entry.text("the path of a statistics file")
        if entry is not None:
            raise value.error("there are stats of this model under tvfast, too; expected one of them.")
        return value.text("the path of a statistics file")

    def _checked(self, value: Value, sources: list[Source], base: str | None, settings: Settings) -> Slice:
        """The slice, if its inputs are as the method needs them."""
        models = [source.model for source in sources]
        for k, model in enumerate(models):
            if model in models[:k]:
                raise value.error(f"{shortened(model)!r} is there twice; expected every model once.")
        position = models.index(base) if base in models else None
        fewest, most = self.info.n_models
        n_models = len(sources)
        if self.reads_base:
            if base is None:
                raise value.error(f"method {self.method!r} needs a base; set base_model.")
            if position is None:
                raise value.error(
                    f"the base {shortened(base)!r} is not among the sources; expected it there, with the "
                    f"layers that method {self.method!r} starts from."
                )
            n_models -= 1
            fewest = 0 if most is None else fewest  # of the base alone there is nothing to add: it is copied
        instruct = models.index(self.instruct) if self.instruct in models else None
        if self.instruct is not None:
            if instruct is None:
                raise value.error(
                    f"the instruct model {shortened(self.instruct)!r} is not among the sources; expected it "
                    "there, with the layers that task vectors are compared with."
                )
            n_models -= 1
            fewest = self.info.n_models[0]
        if n_models < fewest or (most is not None and n_models > most):
            base_too = " besides the base" if self.reads_base else ""
            base_too += " and the instruct model" * (self.instruct is not None)
            many = f"{fewest} model{'s' * (fewest != 1)}" if most is not None else f"{fewest} model at least"
            raise value.error(
                f"method {self.method!r} got {n_models} models{base_too}; expected {many}{base_too}."
            )
        return Slice(tuple(sources), position, settings, value.path, instruct)

    def _check(self, recipe: Recipe) -> None:
        """Raise if a required parameter is given nowhere, or if numbers of all tensors do not fit."""
        resolver = Resolver(recipe, recipe.seed)
        for part in recipe.slices:
            operands = [part.sources[k] for k in resolver.models(part)]
            for key in self.keys.values():
                levels = [part.parameters, part.module, recipe.parameters]
                lacking = operands if key.per_model else [None]
                for source in lacking:
                    at = levels if source is None else [source.parameters, *levels]
                    if key.required and not any(key.name in settings for settings in at):
                        raise self._lacks(key, source)
            if operands and resolver.is_constant(part):
                resolver.method(part, [""] * len(part.sources), "", 0.0)

    def _lacks(self, key: Key, source: Source | None) -> RecipeError:
        place, target = "parameters", "the recipe"
        if source is not None:
            place = f"{source.place} ({shortened(source.model)})"
            target = "the model, or to the recipe for all"
        return RecipeError(
            f"{self.document.where}: {place}: has no {key.name}, which method {self.method!r} needs. "
            f"Add parameters: {{{key.name}: ...}} to {target}."
        )

    # -- the rest ---------------------------------------------------------------------------------------

    def _instruct(self, base: str | None) -> str | None:
        """The instruct model, where the method compares with one."""
        value = self.own.get("instruct")
        given = value is not None and value.plain is not None
        if not self.info.needs_instruct:
            if given and value is not None:
                owners = ", ".join(repr(name) for name, info in METHODS.items() if info.needs_instruct)
                raise value.error(f"belongs to {owners}; method {self.method!r} has no instruct. Remove it.")
            return None
        if value is None or not given:
            raise self.document.error(
                f"method {self.method!r} compares with the instruct model of the base and is given none; "
                "expected its path or hub id as instruct under tvfast."
            )
        model = self.references.read(value)
        if model == base:
            raise value.error(f"{shortened(repr(model))} is the base; expected the model tuned from it.")
        return model

    def _reference(self, key: str) -> str | None:
        return self.references.read(self.entries[key]) if key in self.entries else None

    def _chat_template(self) -> str | None:
        if "chat_template" not in self.entries:
            return None
        value = self.entries["chat_template"]
        template = value.text("auto or a Jinja template")
        if template != "auto" and "{" not in template:
            raise value.expected("auto or a Jinja template; there are no built-in names, paste the template")
        return template

    def _shard_bytes(self) -> int:
        value = self.entries.get("out_shard_size")
        own = self.own.get("out_shard_size")
        if own is not None and own.plain is not None:
            if value is not None:
                raise own.error("there is an out_shard_size outside of tvfast, too; expected one of them.")
            value = own
        return SHARD_BYTES if value is None else n_bytes(value)

    def _words(self) -> dict[str, str]:
        """The method's parameters that are words."""
        found = {}
        takes = {parameter.name: parameter.words for parameter in self.info.parameters if parameter.words}
        for name in WORDS:
            value = self.own.get(name)
            if value is None or value.plain is None:
                continue
            if name not in takes:
                owners = [repr(m) for m, i in METHODS.items() if any(p.name == name for p in i.parameters)]
                raise value.error(
                    f"belongs to {', '.join(owners)}; method {self.method!r} has no {name}. Remove it."
                )
            word = self._word(name, takes[name])
            if word is not None:
                found[name] = word
        return found

    def _word(self, key: str, known: tuple[Word, ...]) -> Word | None:
        value = self.own.get(key)
        if value is None or value.plain is None:
            return None
        for word in known:
            if value.plain == word:
                return word
        raise value.expected(f"one of {', '.join(known)}")


_MODULE = ("models", "slices", "parameters")
_WHAT_MODULES = "a mapping from modules to the beginnings of their tensors' names"
_NONFINITE: tuple[Literal["error"], Literal["propagate"]] = ("error", "propagate")
_ON_MISSING_STATS: tuple[Literal["error"], Literal["plain"]] = ("error", "plain")
_ON_MISSING_SCALE: tuple[Literal["error"], Literal["one"]] = ("error", "one")
_OUT_FORMAT: tuple[Literal["safetensors"], Literal["dcp"]] = ("safetensors", "dcp")
_ON_MISSING: tuple[Literal["error"], Literal["base"]] = ("error", "base")


def _given(entries: Mapping[str, Value]) -> dict[str, Value]:
    """Those that are not null."""
    return {key: value for key, value in entries.items() if value.plain is not None}


def _inputs(slices: Iterable[Slice], base: str | None) -> list[str]:
    """Every model of a recipe, once."""
    sources = [source.model for part in slices for source in part.sources]
    return list(dict.fromkeys([*([] if base is None else [base]), *sources]))
