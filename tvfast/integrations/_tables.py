"""From a peer's tensors to work tables, and the questions that every integration asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, BackendError, MergeError
from tvfast.integrations._patching import NotServed
from tvfast.methods import ProgramMethod, TableStatistics, make_method
from tvfast.methods.scalars import model_key
from tvfast.ops._huge_pages import on_huge_pages
from tvfast.ops.host import first_nonfinite
from tvfast.ops.raw import Look, LookingBackend, backend_for
from tvfast.program import (
    Divisor,
    DType,
    Entry,
    Members,
    ModelScalars,
    Program,
    TensorScalars,
    Tie,
    View,
    Vote,
    WorkTable,
)

_NOT_FINITE = "values that are not finite"
DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


def check_served(tensors: Iterable[Any]) -> None:
    """Raise unless the kernels merge these tensors as the peer's torch code would.

    Raises:
        NotServed: they differ in shape, dtype or device; are empty, not contiguous, of another dtype or
            device; or autograd or autocast watches.
    """
    first: Tensor | None = None
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise NotServed(f"a {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise NotServed(f"dtype {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise NotServed(f"device {tensor.device.type}")
        if tensor.layout != torch.strided or tensor.is_neg() or not tensor.is_contiguous():
            raise NotServed("not contiguous")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotServed("gradients are recorded")
        if first is None:
            first = tensor
            if tensor.numel() == 0:
                raise NotServed("empty tensors")
            if torch.compiler.is_compiling():
                raise NotServed("torch.compile")
            if torch.is_autocast_enabled(tensor.device.type):
                raise NotServed("autocast")
        elif (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise NotServed("different shapes, dtypes or devices")
    if first is None:
        raise NotServed("no tensors")


def number(value: Any, what: str) -> float:
    """A Python number as it is.

    Raises:
        NotServed: anything else, also a number that is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NotServed(f"{what} is no finite number")
    return float(value)


def view(tensor: Tensor) -> View:
    """The memory of a tensor that `check_served` has seen."""
    owner = tensor.detach()
    return View(owner.data_ptr(), owner.numel(), DTYPES[owner.dtype], owner)


def written(tensor: Tensor) -> Tensor:
    """Tell autograd that a kernel has written the tensor."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
    return tensor


def entry(
    models: Sequence[Tensor],
    out: Tensor,
    *,
    base: Tensor | None = None,
    name: str = "",
    row: int = 0,
    task_vectors: bool = False,
) -> Entry:
    """One tensor of a table; without `base` the models stand for themselves."""
    return Entry(
        name=name,
        models=tuple(view(model) for model in models),
        base=None if base is None else view(base),
        out=view(out),
        row=row,
        task_vectors=task_vectors,
    )


def scalars(weights: Sequence[float], **values: Any) -> TensorScalars:
    """Weights of the models; `values` are those of the tensor."""
    return TensorScalars(models=[ModelScalars(weight=weight) for weight in weights], **values)


@dataclass(slots=True)
class Merge:
    """One table, its numbers, and the backend that runs it on as many threads as torch would use.

    Raises:
        NotServed: no backend runs the table.
    """

    entries: list[Entry]
    numbers: list[TensorScalars]
    statistics: TableStatistics = field(init=False)

    def __post_init__(self) -> None:
        table = WorkTable(self.entries, len(self.entries[0].models))
        try:
            backend = backend_for(table)
        except BackendError as error:
            raise NotServed("no backend") from error
        self.statistics = TableStatistics(backend, table, self.new_plane, torch.get_num_threads())

    def trim(self, kept: Callable[[int, int], int], tie: Tie) -> None:
        """Write the bands of the `kept(model, n)` largest magnitudes of each group."""
        bands = self.statistics.bands(lambda _, model, n: (0, kept(model, n)), tie)
        for tensor, row in zip(self.numbers, bands, strict=True):
            for model, band in zip(tensor.models, row, strict=True):
                band.write_to(model)

    def check_finite(self) -> None:
        """Raise if an input is not finite.

        A peer that multiplies by masks makes NaN of an infinity that it drops, which kernels never read.

        Raises:
            NotServed: there is such a value.
        """
        for one in self.entries:
            for operand in (*one.models, *([one.base] if one.base is not None else [])):
                if not _is_finite(operand):
                    raise NotServed(_NOT_FINITE)

    def combine(self, program: Program, *, finite: bool = False) -> None:
        """Write every entry's `out`.

        Args:
            finite: serve inputs alone that are, as `check_finite`, which are searched while they are read. No
                `out` may be an input then.

        Raises:
            NotServed: there is a value that is not; every `out` is to be thrown away.
        """
        me = self.statistics
        if finite and isinstance(me.backend, LookingBackend):
            if me.backend.combine_looking(me.table, program, self.numbers, Look.INPUTS, me.n_threads):
                raise NotServed(_NOT_FINITE)
        else:
            if finite:
                self.check_finite()
            me.backend.combine(me.table, program, self.numbers, me.n_threads)
        for one in self.entries:
            if one.out is not None:
                written(one.out.owner)
            one.masks = ()

    def new_plane(self, n_bits: int) -> View:
        """A zeroed bit plane on the device of the table."""
        device = self.entries[0].models[0].owner.device
        words = torch.zeros((n_bits + 63) // 64, dtype=torch.int64, device=device)
        return View(words.data_ptr(), n_bits, DType.F32, words)


def _is_finite(operand: View) -> bool:
    if operand.owner.device.type == "cpu":
        return first_nonfinite(operand.address, operand.n_elements, operand.dtype) < 0
    return bool(torch.isfinite(operand.owner).all())


def drawn_seed() -> int:
    """A number from torch's generator: `torch.manual_seed` makes merges repeatable, and two calls differ."""
    return int(torch.randint(2**62, ()).item())


def random_keys(peer: str, n_models: int, seed: int | None = None) -> list[int]:
    """Philox keys of one call, from a seed or a drawn one."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    return [model_key(seed, peer, model) for model in range(n_models)]


def from_positive_zero(out: Tensor, weights: Sequence[float]) -> Tensor:
    """A sum of members that began at -0 as if it had begun at +0.

    Members are not zero: their products are -0 together only if they vanish, which takes a small weight.
    """
    return out.add_(0.0) if any(abs(weight) <= 0.5 for weight in weights) else out


def method(name: str, **parameters: Any) -> ProgramMethod:
    """A method of tvfast inside the stage algebra.

    Raises:
        NotServed: it does not take these parameters; the peer has its own word for that.
    """
    try:
        made = make_method(name, **parameters)
    except ArgumentError as error:
        raise NotServed("parameters out of range") from error
    if not isinstance(made, ProgramMethod):
        raise NotServed("a method of whole tensors")
    return made


def merge_by(
    made: ProgramMethod,
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    finite: bool = True,
) -> Tensor:
    """A new tensor, merged by one of tvfast's methods.

    Args:
        made: the method with its parameters.
        base: None: the models stand for the task vectors, and nothing is added.
        models: checked by `check_served`, with the base.
        dtype: of the result; the models' if None.
        finite: serve no call with values that are not; False: the peer multiplies by no mask.

    Raises:
        NotServed: as `Merge` and `check_finite`.
    """
    first = models[0]
    try:
        made.check_models(len(models))
    except ArgumentError as error:
        raise NotServed("parameters out of range") from error
    out = on_huge_pages(torch.empty(first.shape, dtype=dtype or first.dtype, device=first.device))
    views = tuple(view(model) for model in models)
    origin, operands = (None, views) if base is None else made.operands(view(base), views)
    row = made.row_elements(first.shape)
    merge = Merge([Entry(name="tensor", models=operands, base=origin, out=view(out), row=row)], [])
    try:
        program, merge.numbers = made.resolve(merge.statistics)
    except MergeError as error:
        raise NotServed("models that have no such mean") from error
    merge.combine(summed_from_positive_zero(program), finite=finite)
    return out


def summed_from_positive_zero(program: Program) -> Program:
    """The program with sums that begin at +0, as torch's do, where it sums all models.

    Zeros that are left out of such a sum make it +0 if nothing else is in it.
    """
    if program.vote is Vote.NONE and program.divisor is Divisor.NONE:
        return replace(program, members=Members.STRICT)
    return program
