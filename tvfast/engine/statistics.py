"""Which factors belong to which tensor of a merge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tvfast.checkpoint.reading import Checkpoint
from tvfast.engine.rows import Row, some
from tvfast.engine.tasks import TensorWork
from tvfast.errors import RecipeError, StatisticsError
from tvfast.methods import METHODS, ProgramMethod, TensorMethod
from tvfast.recipe import Recipe, Source
from tvfast.statistics import StatisticsFile, StoredForm


class ModelStatistics:
    """The statistics of a recipe's models, for a method that reads factors: headers only.

    Attributes:
        is_read: whether the recipe's method reads any.

    Raises:
        RecipeError: a model has no statistics file.
        StatisticsError: a file holds nothing that the method reads, or is of another model than the one it
            stands beside.
    """

    def __init__(
        self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], statistics: Mapping[str, StatisticsFile]
    ) -> None:
        self._recipe = recipe
        self._kinds = METHODS[recipe.method].cls.statistics
        self._files = statistics
        self._averaged: dict[str, list[str]] = defaultdict(list)
        self.is_read = bool(self._kinds)
        needs_base = recipe.reads_base
        for part in recipe.slices if self.is_read else ():
            for k, source in enumerate(part.sources):
                if not (needs_base and k == part.base):
                    self._check(source, checkpoints[source.model])

    def work(
        self, row: Row, operands: Sequence[int], method: TensorMethod
    ) -> tuple[TensorWork | None, ProgramMethod | None]:
        """What merges a tensor: the method on its records, or what takes its place where there are none.

        Raises:
            StatisticsError: a record of a parameter of another shape.
        """
        shape = row.reference.shape
        found = [self._record(row, k) for k in operands]
        kinds = [None if record is None else record[2] for record in found]
        instead = method.fallback(shape, kinds, len(operands))
        if instead is not None:
            self._averaged[instead[1]].append(row.name)
            return None, instead[0]
        records = tuple(record for record in found if record is not None)
        n_bytes = n_entries = 0
        for file, parameter, kind in records:
            entry = file.entry(parameter, kind, shape)
            for role in entry.roles:
                file.divisor(parameter, kind, role)
                n_bytes += file.place(parameter, kind, role).n_bytes
                where = f"{file.path}: parameter {parameter!r}"
                n_entries += StoredForm.of(entry.options, role, where).n_entries
        scratch = n_bytes + method.scratch_bytes(shape, len(operands), n_entries)
        return TensorWork(method, records, n_bytes, scratch), None

    def notes(self) -> Iterator[str]:
        """What is averaged, and why."""
        for reason, names in self._averaged.items():
            yield f"{self._recipe.method}: averaged, {reason}: {some(names)}."

    def _record(self, row: Row, source: int) -> tuple[StatisticsFile, str, str] | None:
        """File, parameter and kind of one model's record of a tensor."""
        path = row.part.sources[source].stats
        stored = row.inputs[source]
        if path is None or stored is None:
            return None
        file = self._files[path]
        kind = next((kind for kind in self._kinds if (stored.name, kind) in file.entries), None)
        return None if kind is None else (file, stored.name, kind)

    def _check(self, source: Source, checkpoint: Checkpoint) -> None:
        kinds = " and ".join(self._kinds)
        if source.stats is None:
            raise RecipeError(
                f"{self._recipe.where}: {source.place} ({source.model}) has no stats; method "
                f"{self._recipe.method!r} needs a statistics file that holds {kinds} of every model. Make "
                "it with tvfast.curvature.collect and name it as `stats:` of the model."
            )
        file = self._files[source.stats]
        names = [parameter for kind in self._kinds for parameter in file.parameters(kind)]
        if not names:
            raise StatisticsError(
                f"{file.path}: holds {', '.join(file.kinds) or 'nothing'}; method {self._recipe.method!r} "
                f"reads {kinds}. Collect them, or name another file."
            )
        unknown = [name for name in names if name not in checkpoint.tensors]
        if unknown:
            raise StatisticsError(
                f"{file.path}: is of parameter {unknown[0]!r}, which {checkpoint.path} has not "
                f"({len(unknown)} of {len(names)}); expected the statistics of this model."
            )
