"""Which statistics belong to which tensor of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import MERGEABLE
from tvfast.engine.rows import some
from tvfast.engine.tasks import Task
from tvfast.errors import RecipeError, StatisticsError
from tvfast.methods import ProgramMethod
from tvfast.program import ScoreSummary
from tvfast.recipe import Recipe, Source
from tvfast.statistics import StatisticsFile

ROLE = "sum"


class Scoring:
    """Adds scores to the tasks whose method reads them; remembers those that had none."""

    def __init__(self, recipe: Recipe, statistics: Mapping[str, StatisticsFile]) -> None:
        self._recipe = recipe
        self._statistics = statistics
        self._norms: dict[tuple[str, str], float] = {}
        self._plain: dict[ProgramMethod, ProgramMethod] = {}
        self._without: list[str] = []
        self._reads = False

    def with_scores(self, task: Task, sources: Sequence[Source]) -> Task:
        """The task with the scores of its models.

        Raises:
            RecipeError: a model has no statistics file.
            StatisticsError: a tensor has no statistics, or its shape is another.
        """
        method = task.method
        kind = None if method is None else method.score_kind
        if method is None or kind is None or not task.models:
            return task
        self._reads = True
        files = [self._file(source, method) for source in sources]
        names = [stored.name for stored in task.models]
        lacking = [file for file, name in zip(files, names, strict=True) if (name, kind) not in file.entries]
        if lacking and self._recipe.on_missing_stats == "plain" and len(lacking) == len(files):
            self._without.append(task.name)
            return replace(task, method=self._without_scores(method))
        scores, summaries = [], []
        for file, stored in zip(files, task.models, strict=True):
            file.entry(stored.name, kind, stored.shape)
            scores.append(self._place(file, stored.name, kind))
            summaries.append(self._summary(file, stored.name, kind))
        return replace(task, scores=tuple(scores), summaries=tuple(summaries))

    def warnings(self) -> Iterator[str]:
        """What was merged without statistics, and statistics that nothing reads."""
        if self._without:
            yield (
                f"{some(self._without)} have no statistics in any model: merged without, as "
                "on_missing_stats: plain says."
            )
        if self._statistics and not self._reads:
            yield f"method {self._recipe.method!r} reads no statistics; stats have no effect."

    def _file(self, source: Source, method: ProgramMethod) -> StatisticsFile:
        if source.stats is None:
            raise RecipeError(
                f"{self._recipe.where}: {source.place} ({source.model}) has no stats; method "
                f"{method.info.name!r} needs a statistics file that holds {method.score_kind!r} of every "
                "model. Make it with `tvfast collect` and name it as `stats:` of the model."
            )
        return self._statistics[source.stats]

    def _place(self, file: StatisticsFile, name: str, kind: str) -> Stored:
        stored = file.place(name, kind, ROLE)
        if stored.dtype not in MERGEABLE:
            raise StatisticsError(
                f"{file.path}: parameter {name!r}: {kind} is stored as {stored.dtype}; a merge reads "
                f"{', '.join(sorted(MERGEABLE))}. Collect it with one of them."
            )
        return stored

    def _summary(self, file: StatisticsFile, name: str, kind: str) -> ScoreSummary:
        found = file.entry(name, kind).summary(ROLE, file.path)
        return ScoreSummary(
            n_elements=file.place(name, kind, ROLE).n_elements,
            least=found.least,
            most=found.most,
            l1=found.l1,
            squares=found.squares,
            divisor=file.divisor(name, kind, ROLE),
            model_norm=self._norm(file, kind),
        )

    def _norm(self, file: StatisticsFile, kind: str) -> float:
        key = (file.path, kind)
        if key not in self._norms:
            self._norms[key] = file.norm(kind, ROLE)
        return self._norms[key]

    def _without_scores(self, method: ProgramMethod) -> ProgramMethod:
        """The same object for the same method, so that tensors are merged together."""
        if method not in self._plain:
            self._plain[method] = method.without_scores()
        return self._plain[method]
