"""`extract_lora`: the difference of two models as a PEFT adapter, tensor by tensor."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.checkpoint.factors import with_factors
from tvfast.checkpoint.reading import Checkpoint, open_checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.dtypes import BY_RECIPE_NAME
from tvfast.engine.reading import bytes_of, tensor_in_memory
from tvfast.errors import ArgumentError, DTypeError, ShapeError, StateDictError
from tvfast.extraction.decomposition import Decomposition, truncated_svd
from tvfast.extraction.writing import Contents, check_folder, write_adapter

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EMBEDDING = re.compile(r"embed|wte|wpe|lm_head|word_emb", re.IGNORECASE)
_HEADS = ("lm_head", "embed_out", "output")
_TRANSPOSED = ("gpt2",)  # their linear layers are stored as [n_in, n_out]
_ROWS = 512  # of a residual at a time


@dataclass(frozen=True, slots=True)
class Choices:
    """What is asked of an extraction; see `extract_lora`."""

    rank: int
    save_modules: tuple[str, ...]
    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]
    embed_lora: bool
    distribute_scale: bool
    sv_epsilon: float
    skip_undecomposable: bool
    tolerance: float
    seed: int
    dtype: str | None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ArgumentError(f"rank is {self.rank!r}; expected a positive integer.")
        if not 0.0 <= self.sv_epsilon < math.inf:
            raise ArgumentError(f"sv_epsilon is {self.sv_epsilon!r}; expected a number of at least 0.")
        if not 0.0 < self.tolerance <= 1.0:
            raise ArgumentError(f"tolerance is {self.tolerance!r}; expected a number in (0, 1].")
        if self.dtype is not None and self.dtype not in BY_RECIPE_NAME:
            raise ArgumentError(f"dtype is {self.dtype!r}; expected one of {', '.join(BY_RECIPE_NAME)}.")

    def takes(self, module: str) -> bool:
        """Whether a module is to be extracted."""
        if self.include and not any(pattern.search(module) for pattern in self.include):
            return False
        return not any(pattern.search(module) for pattern in self.exclude)


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted.

    Attributes:
        out: directory of the adapter.
        ranks: of the modules that have factors.
        errors: ‖Δ - B A‖ / ‖Δ‖ of them (Frobenius), of the factors as they are stored.
        saved: tensors that are there as a whole.
        equal: modules in which the models agree, so that nothing is stored.
        n_bytes: of the adapter's weights.
        warnings: what a user of the adapter should know.
    """

    out: str
    ranks: dict[str, int]
    errors: dict[str, float]
    saved: tuple[str, ...]
    equal: tuple[str, ...]
    n_bytes: int
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `tvfast extract-lora --json`."""
        return {
            "out": self.out,
            "modules": {
                module: {"rank": rank, "relative_error": self.errors[module]}
                for module, rank in self.ranks.items()
            },
            "saved": list(self.saved),
            "equal": list(self.equal),
            "bytes": self.n_bytes,
            "warnings": list(self.warnings),
        }


def extract_lora(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 128,
    save_modules: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embed_lora: bool = False,
    distribute_scale: bool = True,
    sv_epsilon: float = 0.0,
    skip_undecomposable: bool = False,
    tolerance: float = 2e-3,
    seed: int = 0,
    threads: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the difference of a model and its base as a LoRA adapter that peft loads.

    Of every matrix, Δ = W - W₀ in float32 is approximated by B A of the given rank. Embeddings, the head and
    whatever else is no matrix (norms) are saved as they are in the model, where they differ from the base.

    Args:
        model, base: checkpoints: directories, files or ids of models in the hub's local cache.
        out: directory of the adapter; made if it is not there.
        rank: of every module, at most.
        save_modules: modules that are saved whole: their names, or the last parts of these.
        include, exclude: regular expressions, searched for in names of modules.
        embed_lora: approximate embeddings and the head, too.
        distribute_scale: both factors get the roots of the singular values; otherwise A gets them all.
        sv_epsilon: singular values up to this are dropped.
        skip_undecomposable: leave out what is no matrix, instead of saving it.
        tolerance: excess over the least possible error of that rank, relative; see `truncated_svd`.
        seed: of the random projections.
        threads: 0: all cores.
        dtype: of the factors, as in recipes; None: the base's type of the tensor, float32 of 8-bit ones.
        overwrite: replace an adapter that is there.
        progress: is told (elements done, all elements).

    Raises:
        ArgumentError: a number out of range, a bad expression, or nothing to extract.
        CheckpointError: a checkpoint that is missing or damaged.
        StateDictError, ShapeError: the models do not have one architecture.
        DTypeError: a matrix of a type that cannot be subtracted.
        OutputError: the directory cannot be written, or holds an adapter already.

    Notes:
        One matrix is in memory at a time, in both models' types and in float32, and all factors that are
        done.
    """
    choices = Choices(
        rank=rank,
        save_modules=tuple(save_modules),
        include=_compiled(include, "include"),
        exclude=_compiled(exclude, "exclude"),
        embed_lora=embed_lora,
        distribute_scale=distribute_scale,
        sv_epsilon=sv_epsilon,
        skip_undecomposable=skip_undecomposable,
        tolerance=tolerance,
        seed=seed,
        dtype=dtype,
    )
    first, second = (with_factors(open_checkpoint(path)) for path in (base, model))
    inputs = [checkpoint.directory or checkpoint.path for checkpoint in (first, second)]
    folder = check_folder(os.fspath(out), inputs, overwrite=overwrite)
    extractor = _Extractor(first, second, choices, threads)
    with _torch_threads(threads):
        extractor.run(progress)
    extractor.check()
    n_bytes = write_adapter(extractor.contents, folder)
    return extractor.report(folder, n_bytes)


class _Extractor:
    """Goes through the tensors of two models, module by module."""

    def __init__(self, base: Checkpoint, model: Checkpoint, choices: Choices, threads: int) -> None:
        self._base = base
        self._model = model
        self._choices = choices
        self._threads = threads
        config = model.config or {}
        self._vocabulary = config.get("vocab_size")
        transposed = config.get("model_type") in _TRANSPOSED
        inputs = tuple(checkpoint.directory or checkpoint.path for checkpoint in (base, model))
        self.contents = Contents(base.path, model.path, inputs, transposed)
        self._errors: dict[str, float] = {}
        self._equal_modules: list[str] = []
        self._warnings: list[str] = []
        _check_pairs(base, model)

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Extract every module."""
        modules: dict[str, list[str]] = defaultdict(list)
        for name in self._model.tensors:
            if name not in self._model.aliases:
                modules[name.rpartition(".")[0]].append(name)
        total = sum(stored.n_elements for stored in self._model.tensors.values())
        done = 0
        for module, names in modules.items():
            self._module(module, names)
            done += sum(self._model.tensors[name].n_elements for name in names)
            if progress is not None:
                progress(done, total)

    def check(self) -> None:
        """
        Raises:
            ArgumentError: there is nothing to write.
        """
        if not self.contents.factors and not self.contents.whole:
            raise ArgumentError(
                f"{self._model.path} and {self._base.path} agree in everything that is to be extracted; "
                "expected a difference. Check the paths and the expressions."
            )

    def report(self, folder: str, n_bytes: int) -> Extraction:
        """What was done."""
        return Extraction(
            out=folder,
            ranks={module: a.shape[0] for module, (a, _) in self.contents.factors.items()},
            errors=self._errors,
            saved=tuple(self.contents.whole),
            equal=tuple(self._equal_modules),
            n_bytes=n_bytes,
            warnings=tuple(self._warnings),
        )

    def _module(self, module: str, names: Sequence[str]) -> None:
        weight = f"{module}.weight"
        is_matrix = weight in names and len(self._model.tensors[weight].shape) == 2
        (self.contents.matrices if is_matrix else self.contents.others).append(module)
        if self._saves(module) or (is_matrix and self._keeps_embedding(weight, module)):
            self._save(names)
        elif self._choices.takes(module):
            if is_matrix:
                self._decompose(module, weight)
                self._save([name for name in names if name != weight])
            elif not self._choices.skip_undecomposable:
                self._save(names)

    def _saves(self, module: str) -> bool:
        wanted = self._choices.save_modules
        return module in wanted or module.rpartition(".")[2] in wanted

    def _is_embedding(self, name: str) -> bool:
        module = name.removesuffix(".weight").rpartition(".")[2]
        return bool(_EMBEDDING.search(module)) or self._model.tensors[name].shape[0] == self._vocabulary

    def _keeps_embedding(self, name: str, module: str) -> bool:
        """Whether an embedding or a head is to be saved whole."""
        if not self._is_embedding(name) or any(p.search(module) for p in self._choices.exclude):
            return False
        same = self._base.tensors[name].shape == self._model.tensors[name].shape
        if self._choices.embed_lora and not same:
            self._warnings.append(f"{name}: the vocabularies differ, so it is saved whole.")
        return not (self._choices.embed_lora and same)

    def _save(self, names: Sequence[str]) -> None:
        """Whole tensors, where the models differ."""
        for name in names:
            stored, old = self._model.tensors[name], self._base.tensors[name]
            if stored.shape != old.shape:
                self._warnings.append(
                    f"{name}: has shape {list(stored.shape)}, {list(old.shape)} in the base; resize the "
                    "base's embeddings before the adapter is loaded."
                )
            elif self._equal(name):
                continue
            self.contents.whole[name] = stored

    def _equal(self, name: str) -> bool:
        """Whether both models hold the same bytes."""
        one, other = self._base.tensors[name], self._model.tensors[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(bytes_of(one), bytes_of(other), strict=True)
        if not all(a == b for a, b in pairs):
            return False
        factors = [side for stored in (one, other) for side in stored.sides]
        return len(factors) != 2 or b"".join(bytes_of(factors[0])) == b"".join(bytes_of(factors[1]))

    def _decompose(self, module: str, name: str) -> None:
        old = self._base.tensors[name]
        delta = self._difference(old, self._model.tensors[name])
        if not bool(delta.any()):
            self._equal_modules.append(module)
            return
        embedding = self._is_embedding(name) and module.rpartition(".")[2] not in _HEADS
        if embedding or self.contents.transposed:
            delta = delta.T.contiguous()
        found = truncated_svd(
            delta, self._choices.rank, tolerance=self._choices.tolerance, generator=self._generator(name)
        )
        kept = max(1, int((found.s > self._choices.sv_epsilon).sum()))
        dtype = old.operand if self._choices.dtype is None else BY_RECIPE_NAME[self._choices.dtype]
        a, b = _factors(found, kept, self._choices.distribute_scale, _TORCH[dtype])
        self.contents.factors[module] = (a, b)
        self._errors[module] = _relative_error(delta, a, b)
        if embedding:
            self.contents.embeddings.add(module)

    def _difference(self, old: Stored, new: Stored) -> Tensor:
        """Δ, float32; not finite numbers are refused.

        Raises:
            ArgumentError: NaN or infinity.
            DTypeError: a storage type that is no number here.
        """
        for stored in (new, old):
            if stored.operand not in _TORCH:
                raise DTypeError(
                    f"{stored.path}: tensor {stored.name!r} is {stored.dtype}; expected one of "
                    f"{', '.join(_TORCH)}, or 8-bit codes with scales. Exclude the module, or save it whole."
                )
        with tensor_in_memory(new, self._threads) as view:
            delta = _as_tensor(view, new).to(torch.float32, copy=True)
        with tensor_in_memory(old, self._threads) as view:
            delta -= _as_tensor(view, old)
        if not bool(torch.isfinite(delta.sum())) and not bool(torch.isfinite(delta).all()):
            raise ArgumentError(
                f"tensor {new.name!r}: {new.path} and {old.path} differ by NaN or infinity; expected finite "
                "numbers. Give other checkpoints, or exclude the module."
            )
        return delta

    def _generator(self, name: str) -> torch.Generator:
        """Of one tensor, whatever else is extracted."""
        key = hashlib.blake2b(f"{self._choices.seed}\0{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def _as_tensor(view: memoryview, stored: Stored) -> Tensor:
    dtype = _TORCH[stored.operand]
    data = torch.frombuffer(view, dtype=torch.uint8)
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(stored.shape)


def _factors(found: Decomposition, kept: int, distribute: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [rank, n] and B [m, rank] with B A = U diag(s) Vᵀ."""
    s = found.s[:kept]
    root = s.sqrt()
    of_a, of_b = (root, root) if distribute else (s, torch.ones_like(s))
    a, b = of_a[:, None] * found.vt[:kept], found.u[:, :kept] * of_b
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


def _relative_error(delta: Tensor, a: Tensor, b: Tensor) -> float:
    """‖Δ - B A‖ / ‖Δ‖, Frobenius, by rows."""
    wide = a.float()
    left = total = 0.0
    for begin in range(0, len(delta), _ROWS):
        rows = delta[begin : begin + _ROWS]
        total += float(rows.square().sum(dtype=torch.float64))
        left += float((rows - b[begin : begin + _ROWS].float() @ wide).square().sum(dtype=torch.float64))
    return math.sqrt(left / total) if total else 0.0


def _check_pairs(base: Checkpoint, model: Checkpoint) -> None:
    """
    Raises:
        StateDictError: other names.
        ShapeError: other shapes, except of embeddings.
    """
    for here, there in ((model, base), (base, model)):
        missing = [name for name in here.tensors if name not in there.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise StateDictError(
                f"{there.path} lacks {missing[0]!r}{more}, which {here.path} has; expected two models of one "
                "architecture."
            )
    for name, stored in model.tensors.items():
        old = base.tensors[name]
        if stored.shape[1:] != old.shape[1:] or (
            stored.shape != old.shape and not (len(stored.shape) == 2 and _EMBEDDING.search(name))
        ):
            raise ShapeError(
                f"tensor {name!r}: {model.path} has shape {list(stored.shape)}, {base.path} has "
                f"{list(old.shape)}; expected equal ones."
            )


def _compiled(expressions: Sequence[str], what: str) -> tuple[re.Pattern[str], ...]:
    try:
        return tuple(re.compile(expression) for expression in expressions)
    except re.error as error:
        raise ArgumentError(f"{what}: {error.pattern!r} is no regular expression: {error}.") from None


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    """Torch's threads for the time of a block; 0: all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
