"""What has to be done for one tensor of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvfast.checkpoint.layout import Described
from tvfast.checkpoint.stored import Stored, matrix_of
from tvfast.engine.gather import Gather
from tvfast.methods.base import ProgramMethod, TensorMethod
from tvfast.program import ScoreSummary
from tvfast.statistics import StatisticsFile


@dataclass(frozen=True, slots=True)
class TensorWork:
    """A merge of a whole tensor outside the stage algebra.

    Attributes:
        method: with the numbers of this very tensor.
        statistics: of each model: the file and the parameter's name and kind there.
        record_bytes: of all their records.
        scratch_bytes: memory that the merge takes beside the tensors.
    """

    method: TensorMethod
    statistics: tuple[tuple[StatisticsFile, str, str], ...]
    record_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a result becomes 8-bit codes.

    Attributes:
        rows, columns: of a block that shares a factor.
        factors: the tensor of the output that holds them; None: all are 1.
        power_of_two: factors are rounded up to powers of two.
    """

    rows: int
    columns: int
    factors: Described | None
    power_of_two: bool


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of the output and what it is made of.

    Attributes:
        name: in the output.
        key: the name that draws and tie hashes are keyed by; tied tensors share one, and so their bytes.
        dtype: safetensors name of the output's storage type.
        shape: of the output and of every input.
        method: with the numbers of this very tensor. None: the bytes of `models[0]` are copied, and every
            further model must hold the same bytes.
        base: θ₀, where the method reads it.
        models: θ_k in the order of the method's weights.
        scores: of every model, where the method reads them.
        summaries: of the scores.
        tensor: what merges the tensor, where that is not a method of the stage algebra; `method` is None
        then.
        encoding: of a result that is computed as float32 and stored as 8-bit codes.
        gather: where the rows of the inputs come from, if they are not those of a file one after the other.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    method: ProgramMethod | None
    base: Stored | None
    models: tuple[Stored, ...]
    scores: tuple[Stored, ...] = ()
    summaries: tuple[ScoreSummary, ...] = ()
    tensor: TensorWork | None = None
    encoding: Encoding | None = None
    gather: Gather | None = None

    @property
    def result(self) -> str:
        """Storage type of what is computed."""
        return self.dtype if self.encoding is None else "F32"

    @property
    def described(self) -> tuple[Described, ...]:
        """What the output gets: the tensor, and its factors after it."""
        own = (self.name, self.dtype, self.shape)
        factors = None if self.encoding is None else self.encoding.factors
        return (own,) if factors is None else (own, factors)

    @property
    def is_merged(self) -> bool:
        """Whether the result is computed; otherwise bytes are copied."""
        return self.method is not None or self.tensor is not None

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def inputs(self) -> tuple[Stored, ...]:
        """Everything that is read: the base first, scores last."""
        operands = self.models if self.base is None else (self.base, *self.models)
        return operands + self.scores


def row_elements(task: Task) -> int:
    """Elements of a row that must be in memory together; 0: none."""
    if task.method is None or not task.method.program().ranks_rows:
        return 0
    return task.method.row_elements(task.shape) or task.n_elements


def step_elements(task: Task) -> int:
    """Elements at whose multiples a tensor may be cut: whole rows, whole blocks of codes; 0: anywhere."""
    row = row_elements(task)
    if task.encoding is None or task.encoding.factors is None:
        return row
    rows, columns = matrix_of(task.shape)
    n_matrices = task.n_elements // max(1, rows * columns)
    block = task.encoding.rows
    whole = block >= rows or (n_matrices > 1 and rows % block)  # blocks begin anew with each matrix
    step = (rows if whole else block) * columns
    return max(1, min(math.lcm(row or 1, step), task.n_elements))
