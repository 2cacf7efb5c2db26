"""Functions of tensors as merge methods, by a decorator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from typing import Any, ClassVar, TypeVar

from tvfast.errors import ArgumentError, MergeError, ShapeError
from tvfast.methods.base import TensorJob, TensorResult, register_method
from tvfast.methods.registry import METHODS
from tvfast.methods.whole.base import WholeMethod

F = TypeVar("F", bound=Callable[..., Any])

KINDS = ("float", "int", "bool", "PerModel")
"""Annotations of parameters."""


def custom_method(
    name: str,
    *,
    source: str = "",
    needs_base: bool = True,
    n_models: tuple[int, int | None] = (1, None),
) -> Callable[[F], F]:
    """Function decorator: make a function of whole tensors a merge method, for `merge`, recipes and all else.

    ```python
    @custom_method("softened", n_models=(1, None))
    def softened(models, base, *, weights: PerModel = 1.0, power: float = 0.5):
        \"""θ = θ₀ + λ Σ_k w_k sign(τ_k) |τ_k|^power.\"""
        taus = [model - base for model in models]
        return base + sum(w * tau.sign() * tau.abs() ** power for w, tau in zip(weights, taus))
    ```

    The function gets the models as a list of tensors, the base unless `needs_base` is False, and its keyword
    parameters, all of which have defaults: `float`, `int`, `bool`, or `PerModel`, a tuple with one number per
    model. Tensors are float32 (float64 where one is), on the device where they are; the function returns
    one of their shape and does not write into them. λ (`scale`) is applied to what it returns. A recipe takes
    the parameters by these names, `weights` as `weight`; the module that defines the method has to be
    imported first.

    Raises:
        ArgumentError: the name is taken, or the function's parameters are not as above.
    """
    if name in METHODS:
        raise ArgumentError(f"method {name!r} exists; expected another name.")

    def decorate(function: F) -> F:
        kinds = _parameters(name, function, needs_base)
        own = [
            (key, kind, field(default=default, metadata={"meaning": f"of {function.__qualname__}"}))
            for key, (kind, default) in kinds.items()
        ]
        namespace = {
            "__doc__": inspect.getdoc(function) or f"The function {function.__qualname__}.",
            "__module__": function.__module__,
            "unused": frozenset({"weights"} - set(kinds)),
            "function": staticmethod(function),
            "kinds": {key: kind for key, (kind, _) in kinds.items()},
        }
        made = make_dataclass(
            f"{function.__name__}_method",
            own,
            bases=(_Custom,),
            namespace=namespace,
            frozen=True,
            kw_only=True,
        )
        register_method(name, source=source, needs_base=needs_base, n_models=n_models)(made)
        return function

    return decorate


def _parameters(name: str, function: Callable[..., Any], needs_base: bool) -> dict[str, tuple[str, Any]]:
    """(kind, default) of each keyword parameter."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 1 + needs_base:
        expected = "models and base" if needs_base else "models"
        raise ArgumentError(
            f"method {name!r}: the function has {len(positional)} positional parameters; expected "
            f"{expected}, and the rest behind a *."
        )
    found = {}
    for p in parameters[len(positional) :]:
        kind = (
            p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, "__name__", "PerModel")
        )
        kind = kind.rpartition(".")[2]
        if p.kind is not p.KEYWORD_ONLY or kind not in KINDS or p.default is p.empty:
            raise ArgumentError(
                f"method {name!r}: parameter {p.name!r} is '{p}'; expected a keyword with a default, "
                f"annotated as one of {', '.join(KINDS)}."
            )
        found[p.name] = (kind, p.default)
    return found


class _Custom(WholeMethod):
    """Calls a function."""

    function: ClassVar[Callable[..., Any]]
    kinds: ClassVar[dict[str, str]]

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, kind in self.kinds.items():
            if kind == "bool":
                self._check_flag(key)
            elif kind == "int":
                self._check_whole(key)
            else:
                self._normalise(key, finite=True, per_model=kind == "PerModel")

    def _check_whole(self, key: str) -> None:
        self._normalise(key, finite=True, per_model=False)
        value = getattr(self, key)
        if value != int(value):
            raise ArgumentError(f"method {self.info.name!r}: {key} is {value}; expected a whole number.")
        object.__setattr__(self, key, int(value))

    def merge(self, jobs: Sequence[TensorJob]) -> list[TensorResult]:
        return [self._one(job) for job in jobs]

    def _one(self, job: TensorJob) -> TensorResult:
        import torch

        operands = job.models if job.base is None else (job.base, *job.models)
        wide = torch.float32
        for x in operands:
            wide = torch.promote_types(wide, x.dtype)
        base, models = None if job.base is None else job.base.to(wide), [m.to(wide) for m in job.models]
        arguments = {
            key: self.per_model(key, len(models)) if kind == "PerModel" else getattr(self, key)
            for key, kind in self.kinds.items()
        }
        result = self.function(models, *([] if base is None else [base]), **arguments)
        if not isinstance(result, torch.Tensor):
            raise MergeError(
                f"method {self.info.name!r} returned {type(result).__name__} for tensor {job.name!r}; "
                "expected a tensor."
            )
        if result.shape != models[0].shape:
            raise ShapeError(
                f"method {self.info.name!r} returned shape {list(result.shape)} for tensor {job.name!r}; "
                f"expected {list(models[0].shape)}."
            )
        if self.scale != 1.0:
            result = result * self.scale if base is None else base + (result - base) * self.scale
        return TensorResult(result)

    def scratch_bytes(self, shape: Sequence[int], n_models: int, record_bytes: int) -> int:
        """Inputs in float32, and as much again for the function's own."""
        return 2 * (n_models + 2) * super().scratch_bytes(shape, n_models, record_bytes)
