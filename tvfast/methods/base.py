"""What a method is: a frozen choice of stages and scalars, or a function of tensors."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from tvfast.errors import ArgumentError, UnknownNameError
from tvfast.methods.registry import METHODS, MethodInfo, Parameter
from tvfast.methods.scalars import float32, model_key
from tvfast.methods.statistics import TableStatistics
from tvfast.program import Entry, ModelScalars, Program, TensorScalars, Tie, View, WorkTable

if TYPE_CHECKING:
    from torch import Tensor

    from tvfast.factors.records import Curvature

PerModel: TypeAlias = float | Sequence[float]
"""One value, or one per model."""

MergeViews: TypeAlias = Callable[[View | None, Sequence[View], View, Sequence[int], int, int], None]
"""(base, models, out, shape, scratch, number of threads): merges one tensor of at least one element; scratch
is the address of memory of the method's `scratch_bytes`, aligned to 64."""

TIES = {"ge": Tie.GE, "index": Tie.INDEX, "hash": Tie.HASH}
DEFAULT_TIES = {"mergekit": "hash", "paper": "ge"}


M = TypeVar("M", bound="Method")
S = TypeVar("S")


def register_method(
    name: str,
    *,
    source: str,
    dialects: tuple[str, ...] = ("mergekit",),
    needs_base: bool = True,
    n_models: tuple[int, int | None] = (1, None),
    needs_scores: bool = False,
    optional_base: bool = False,
    needs_instruct: bool = False,
) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a method known under `name`; the first of `dialects` is its default.

    Args:
        source: paper or program that defines it.
        needs_base: whether the base's values are an operand.
        n_models: fewest and most models, base not counted.
        needs_scores: whether every model must bring scores; `score_kind` says of which kind.
        optional_base: whether a recipe may have no base; the method then has a flag `task_vectors`.
        needs_instruct: whether task vectors are compared with that of an instruct model.
    """

    def decorate(cls: type[M]) -> type[M]:
        parameters = tuple(
            Parameter(f.name, f.default, f.metadata.get("meaning", ""), f.metadata.get("words", ()))
            for f in fields(cls)
            if f.name not in cls.unused
        )
        cls.info = METHODS[name] = MethodInfo(
            name,
            cls,
            source,
            dialects,
            needs_base,
            n_models,
            parameters,
            needs_scores,
            optional_base,
            needs_instruct,
        )
        return cls

    return decorate


def parameter(default: Any, meaning: str, words: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its one-line meaning, and the words that it can be."""
    return field(default=default, metadata={"meaning": meaning, "words": words})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A merge method. Every parameter is checked when it is made.

    Raises:
        ArgumentError: a value outside its range, with what was found and expected.
        UnknownNameError: `tie` or `dialect` does not exist.
    """

    info: ClassVar[MethodInfo]
    unused: ClassVar[frozenset[str]] = frozenset()  # shared parameters that mean nothing here
    statistics: ClassVar[tuple[str, ...]] = ()  # kinds of records that a `TensorMethod` reads of every model

    weights: PerModel | None = parameter(None, "w_k: one, or one per model; 1 by default")
    scale: float = parameter(1.0, "λ: multiplies the merged task vector")
    seed: int = parameter(0, "key of random draws and of tie='hash'")
    tie: str | None = parameter(
        None, "entries equal to a threshold: 'ge', 'index' or 'hash'; by dialect if None"
    )
    dialect: str = parameter("mergekit", "whose reading of the method")

    def __post_init__(self) -> None:
        if self.weights is not None:
            self._normalise("weights", finite=True)
        self._normalise("scale", finite=True, per_model=False)
        object.__setattr__(self, "seed", integer("seed", self.seed))
        if self.dialect == "mergekit" and "mergekit" not in self.info.dialects:
            object.__setattr__(self, "dialect", self.info.dialects[0])  # mergekit has no such method
        check_name("dialect", self.dialect, self.info.dialects, f"method {self.info.name!r}")
        if self.tie is not None:
            check_name("tie", self.tie, TIES, f"method {self.info.name!r}")

    @property
    def reads_base(self) -> bool:
        """Whether θ₀ is an operand."""
        return self.info.needs_base

    def specialised(self) -> Method:
        """What carries the method out; another class where these parameters leave the stage algebra."""
        return self

    # -- for subclasses -----------------------------------------------------------------------------

    def check_models(self, n_models: int) -> None:
        """Raise unless the method takes this many models and every per-model parameter has as many values.

        Raises:
            ArgumentError: naming the parameter, how many were found and expected.
        """
        fewest, most = self.info.n_models
        if n_models < fewest or (most is not None and n_models > most):
            expected = (
                f"{fewest}"
                if most == fewest
                else f"at least {fewest}"
                if most is None
                else f"{fewest} to {most}"
            )
            raise ArgumentError(
                f"method {self.info.name!r} got {n_models} models; expected {expected} besides the base."
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != n_models:
                raise ArgumentError(
                    f"method {self.info.name!r}: {f.name} has {len(value)} values for {n_models} models; "
                    "expected one value or one per model."
                )

    def per_model(self, name: str, n_models: int) -> tuple[float, ...]:
        """A parameter as one value per model; an absent one is all 1."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            return value
        return (1.0 if value is None else float(value),) * n_models

    def _normalise(self, name: str, *, finite: bool = False, per_model: bool = True) -> None:
        """Replace a numeric parameter by a float or a tuple of floats."""
        value = numbers(name, getattr(self, name))
        if isinstance(value, tuple) and len(value) == 1 and self.info.n_models == (1, 1):
            value = value[0]  # the one model's
        if isinstance(value, tuple) and not per_model:
            raise ArgumentError(f"method {self.info.name!r}: {name} is a sequence; expected one number.")
        for item in value if isinstance(value, tuple) else (value,):
            if finite and not math.isfinite(float32(item)):
                raise ArgumentError(
                    f"method {self.info.name!r}: {name} is {item}; expected a finite number that "
                    "float32 holds."
                )
        object.__setattr__(self, name, value)

    def _check_fractions(self, *names: str) -> None:
        """Normalise parameters that are shares; raise unless every value is in [0, 1]."""
        for name in names:
            self._normalise(name)
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if not 0.0 <= item <= 1.0:
                    raise ArgumentError(
                        f"method {self.info.name!r}: {name} is {item}; expected a number in [0, 1]."
                    )

    def _refuse_weights(self) -> None:
        """Raise if there are weights, which the method has no place for."""
        if self.weights is not None:
            raise ArgumentError(
                f"method {self.info.name!r} takes no weights; found {self.weights!r}, expected None."
            )

    def _check_least(self, name: str, *, zero: bool = True) -> None:
        """Normalise one number; raise unless it is finite and above 0, or 0 where `zero`."""
        self._normalise(name, finite=True, per_model=False)
        value = getattr(self, name)
        if value < 0 or (value == 0 and not zero):
            expected = "a number of 0 or more" if zero else "a number above 0"
            raise ArgumentError(f"method {self.info.name!r}: {name} is {value}; expected {expected}.")

    def _check_count(self, name: str) -> None:
        """Normalise a count, which may come as a float, as numbers of a recipe do."""
        self._check_least(name)
        value = getattr(self, name)
        if value != int(value):
            raise ArgumentError(f"method {self.info.name!r}: {name} is {value}; expected a whole number.")
        object.__setattr__(self, name, int(value))

    def _check_word(self, name: str) -> None:
        """Raise unless the parameter is one of its words, or None."""
        known = next(p.words for p in self.info.parameters if p.name == name)
        if getattr(self, name) is not None:
            check_name(name, getattr(self, name), known, f"method {self.info.name!r}")

    def _check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, bool):
            raise ArgumentError(f"method {self.info.name!r}: {name} is {value!r}; expected True or False.")


@dataclass(frozen=True, slots=True)
class Aside:
    """What merges a tensor that a method leaves out of its comparisons.

    Attributes:
        method: over the same operands.
        copied: the operand that the result is, 0 the base, k + 1 the k-th model; None: it is computed.
    """

    method: ProgramMethod
    copied: int | None


@dataclass(frozen=True, kw_only=True)
class ProgramMethod(Method):
    """A merge method inside the stage algebra."""

    random: ClassVar[bool] = False  # whether entries are drawn, so that every model needs a key
    plain_weights: ClassVar[bool] = True  # whether w_k is `ModelScalars.weight` and enters no other number

    # -- the three questions ------------------------------------------------------------------------

    @abstractmethod
    def program(self) -> Program:
        """The stages."""

    def scalars(self, statistics: TableStatistics) -> list[TensorScalars]:
        """The numbers of every tensor; asks `statistics` for what must be measured."""
        return self.plain_scalars(statistics.table)

    def resolve(self, statistics: TableStatistics) -> tuple[Program, list[TensorScalars]]:
        """Stages and numbers together, for methods whose stages depend on what fits in memory."""
        return self.program(), self.scalars(statistics)

    # -- how tensors become rows of a work table ----------------------------------------------------

    def operands(self, base: View, models: tuple[View, ...]) -> tuple[View | None, tuple[View, ...]]:
        """(base, models) of an `Entry`: without a base, the models themselves are merged."""
        return (base if self.reads_base else None), models

    def row_elements(self, shape: Sequence[int]) -> int:
        """Elements per row for rank stages; 0: the whole tensor is one row."""
        return 0

    @property
    def whole_model(self) -> bool:
        """Whether thresholds and majorities are taken over all tensors together, in order of name."""
        return False

    def group_of(self, name: str) -> str | None:
        """Tensors of equal answers are ranked together, in order of name; None: a tensor by itself."""
        return "" if self.whole_model else None

    def aside(self, name: str, n_models: int) -> Aside | None:
        """What merges a tensor of this name where the method has no rule for it; None: the method does.

        Args:
            n_models: operands besides the base.
        """
        return None

    def nothing_ranked(self) -> str:
        """What is said where `aside` takes all tensors."""
        return f"method {self.info.name!r} has no rule for any of the tensors."

    @property
    def score_kind(self) -> str | None:
        """The kind of statistics that every model must bring, see `docs/statistics.md`; None: none."""
        return None

    def without_scores(self) -> ProgramMethod:
        """What merges a tensor that has no scores as if every entry of it counted alike."""
        return self

    def score_operands(self, scores: tuple[S, ...]) -> tuple[S, ...]:
        """Scores of an `Entry` from those of the models, in the order of `operands`."""
        return scores

    def plane_bytes(self, n_elements: int, n_models: int) -> int:
        """Bytes of bit planes wanted for one tensor; merges go in batches that fit `PLANE_BYTES`."""
        return 0

    # -- for subclasses -----------------------------------------------------------------------------

    @property
    def tie_rule(self) -> Tie:
        return TIES[self.tie or DEFAULT_TIES[self.dialect]]

    def plain_scalars(self, table: WorkTable) -> list[TensorScalars]:
        """Weights, scale and, where draws or hashed ties need them, keys. Everything else at its default."""
        weights = self.per_model("weights", table.n_models)
        keyed = self.random or self.program().tie is Tie.HASH
        return [
            TensorScalars(
                models=[
                    ModelScalars(weight=weight, key=model_key(self.seed, entry.name, k) if keyed else 0)
                    for k, weight in enumerate(weights)
                ],
                scale=self.scale,
            )
            for entry in table.entries
        ]


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor to be merged as a whole.

    Attributes:
        name: for messages.
        base: θ₀, where the method reads it.
        models: θ_k.
        curvature: of each model; None where its statistics have nothing on this tensor.
    """

    name: str
    base: Tensor | None
    models: tuple[Tensor, ...]
    curvature: tuple[Curvature | None, ...]


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A merged tensor, float32 or float64, and what a report says of it; "" for nothing."""

    tensor: Tensor
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TensorMethod(Method):
    """A merge method outside the stage algebra: a function of whole tensors, computed with torch."""

    @abstractmethod
    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        """Merge tensors; several where they fit in memory together.

        Raises:
            SolveError: singular or non-finite statistics, naming the tensor.
            ShapeError: statistics that do not fit it.
        """

    def merge_views(self) -> MergeViews | None:
        """What merges one tensor in host memory without torch; None: `merge` has to."""
        return None

    @abstractmethod
    def fallback(
        self, shape: Sequence[int], kinds: Sequence[str | None], n_models: int
    ) -> tuple[ProgramMethod, str] | None:
        """What merges a tensor that the method has no rule for, and why; None: the method does.

        Args:
            shape: of the tensor.
            kinds: of each model's record of it; None: there is none.
        """

    @abstractmethod
    def scratch_bytes(self, shape: Sequence[int], n_models: int, n_entries: int) -> int:
        """Memory that merging one tensor takes beside its inputs, its records and its result, at most.

        Args:
            n_entries: of all models' factors of it, as matrices.
        """


def share_groups(method: ProgramMethod, entries: Sequence[Entry]) -> None:
    """Number the groups of a table: one for all that are ranked together, in order of name."""
    numbers: dict[str, int] = {}
    filled: dict[str, int] = {}
    shared = sorted((e for e in entries if method.group_of(e.name) is not None), key=lambda e: e.name)
    for entry in shared:
        key = str(method.group_of(entry.name))
        entry.group = numbers.setdefault(key, len(numbers))
        entry.group_offset = filled.get(key, 0)
        filled[key] = entry.group_offset + entry.n_elements
    alone = (e for e in entries if method.group_of(e.name) is None)
    for group, entry in enumerate(alone, start=len(numbers)):
        entry.group = group


def own_values(method: Method) -> dict[str, Any]:
    """The parameters of a method, by name."""
    return {f.name: getattr(method, f.name) for f in fields(method)}


def numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """A number as float; a sequence, array or 1-D tensor of numbers as a tuple.

    Raises:
        ArgumentError: anything else.
    """
    if not isinstance(value, bool | str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
        try:
            if isinstance(value, Iterable):
                return tuple(float(item) for item in value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ArgumentError(f"{name} is {value!r}; expected a number or one number per model.")


def integer(name: str, value: Any) -> int:
    """An integer of any library as int.

    Raises:
        ArgumentError: anything else, booleans too.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ArgumentError(f"{name} is {value!r}; expected an integer.")


def check_name(what: str, found: object, known: Iterable[str], place: str) -> None:
    """Raise unless `found` is a known name.

    Raises:
        UnknownNameError: with the nearest known name.
    """
    names = list(known)
    if found not in names:
        raise UnknownNameError(
            f"{place}: {what} {found!r} does not exist;{nearest(str(found), names)} "
            f"expected one of {', '.join(names)}."
        )


def nearest(found: str, known: Iterable[str]) -> str:
    """ " did you mean 'x'?" for the nearest known name, or nothing."""
    matches = get_close_matches(found, list(known), n=1)
    return f" did you mean {matches[0]!r}?" if matches else ""
