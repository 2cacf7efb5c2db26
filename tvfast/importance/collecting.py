"""`collect`: importance and diagonal Fisher of any module on any batches, into a statistics file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tvfast._leaves import Weights, named_tensors
from tvfast.errors import ArgumentError, ShapeError, StateDictError, StatisticsError
from tvfast.importance.files import Parts, Progress
from tvfast.importance.gradients import SampleGradients, Taker, sample_of
from tvfast.importance.objectives import FISHERS, KINDS, FisherReading, objectives
from tvfast.methods.base import check_name
from tvfast.ops import score
from tvfast.statistics import Document, StatisticsFile
from tvfast.statistics.tensors import model_identity, parameter_names

Batches: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a function that starts them anew; what can be iterated once serves one pass only."""

_OUTSIDE = 2**-20  # of the largest gradient's norm: what is below it is rounding


def collect(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Batches,
    path: str | os.PathLike[str] | None = None,
    *,
    kind: str = "weight",
    base: Weights | None = None,
    fisher: str = "mats",
    per_sample: bool = True,
    micro_batch: int | None = None,
    parameters: Callable[[str], bool] | Iterable[str] | None = None,
    layers_at_a_time: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    name: str = "",
    content: bool = False,
    checkpoint_every: int = 0,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> StatisticsFile | dict[str, Tensor]:
    """Importance of every entry of a model's parameters on data, summed over samples.

    |g θ| for kind="weight" (STA), |g (θ - θ₀)| for "delta", g² for "fisher", g being the gradient of one
    sample's loss: absolute values and squares are taken inside the sum.

    Args:
        model: any module; run in evaluation mode, and left as it was.
        loss_fn: (model, batch) -> loss of each sample, [N], each of its own sample only; one number makes the
            batch count as one sample. For `fisher` readings over labels: logits, [N, C], of "mats_true" and
            "mergelm" also [N, ..., C].
        batches: any iterable of what `loss_fn` takes. Several passes need one that can be iterated anew.
        path: of the statistics file; None: the means are returned and nothing is written.
        kind: "weight", "delta" or "fisher".
        base: θ₀, of the model's names and shapes, for "delta".
        fisher: whose diagonal Fisher: "mats" takes the given loss of each sample, "mats_true" a label drawn
            from the model, "matena_raffel" the expectation over all labels exactly, one backward pass for
            each; "mergelm" squares the gradient of a whole batch, so that it depends on the batches.
        per_sample: False: each batch is one micro-batch.
        micro_batch: an approximation: gradients of so many samples are added before |Σ g θ|, or (Σ g)² / n.
            Never above the per-sample importance, and near zero where a converged model's gradients cancel.
        parameters: which, by name; None: all floating-point ones.
        layers_at_a_time: modules whose parameters are collected in one pass over the batches; None: all.
            Memory is 4 bytes per parameter of these, their gradients one at a time, and activations.
        dtype: of the stored sums: "float32", "float64", "bfloat16" or "float16".
        seed: of drawn labels.
        data: what the batches are, for the statistics file.
        name: of the model, for the statistics file.
        content: store a digest of the model's values, too.
        checkpoint_every: batches after which the sums of an unfinished pass are saved; 0: only whole passes.
        resume: go on where a run of the same arguments was cut off; it must see the same batches.
        progress: is told after every batch.

    Returns:
        The statistics file, or the mean of every parameter by name, float32; both are `scores` of `merge_`.

    Raises:
        ArgumentError, UnknownNameError: an argument, or what `loss_fn` returned.
        ShapeError, StateDictError: losses or `base` do not fit.
        StatisticsError: a gradient is not finite, no sample came, a saved run is of other arguments.
        OutputError: `path` cannot be written.

    Notes:
        Linear layers and embeddings are summed sample by sample from captured activations in one batched pass
        (see `tvfast.importance.gradients`); any other module is run again on each sample alone. The first
        batch of a pass is compared with autograd; parameters that do not agree (used outside of their module,
        in tensors not split along samples) get a backward pass of their own for every sample. Sums are
        float32, float64 for float64 parameters, in the order of the samples: independent of how they are
        batched up to the rounding of batched products.

    Source: |g θ|: Tian et al. 2024, arXiv:2411.16139; g²: Matena & Raffel 2021, arXiv:2111.09832.
    """
    reading = _reading(kind, fisher, base)
    chunk = _chunk(per_sample, micro_batch, reading)
    chosen = _chosen(model, parameters)
    origin = _origin(base, chosen)
    groups = _groups(chosen, layers_at_a_time)
    replay = _Replay(batches, len(groups))
    collection = {
        "kind": kind,
        "samples_per_gradient": chunk,
        "loss": getattr(loss_fn, "__qualname__", type(loss_fn).__name__),
        **({} if reading is None else {"fisher": fisher, "meaning": reading.meaning, "seed": seed}),
    }
    document = Document(
        model_identity(model, name, content=content), () if data is None else (dict(data),), collection
    )
    parts = Parts(path, document, kind, dtype, resume=resume, every=checkpoint_every, progress=progress)
    run = _Run(model, loss_fn, kind, reading, fisher, chunk, seed, origin)
    with _frozen(model), torch.enable_grad():
        for index, names in enumerate(groups):
            own = {one: chosen[one] for one in names}
            if not parts.is_done(index, own):
                run.group(own, replay, parts, index, len(groups))
    return parts.finish()


@dataclass(slots=True)
class _Run:
    """One collection: what is differentiated, and what becomes of gradients."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    kind: str
    reading: FisherReading | None
    fisher: str
    chunk: int
    seed: int
    origin: Mapping[str, Tensor]

    def group(
        self, own: Mapping[str, nn.Parameter], replay: _Replay, parts: Parts, index: int, n_groups: int
    ) -> None:
        """One pass over the batches for some parameters."""
        sums = parts.begin(index, n_groups, own)
        adder = _Adder(self.kind, self.fisher, own, self.origin, sums)
        alone: dict[str, nn.Parameter] | None = None
        for position, batch in enumerate(replay.start()):
            if position < parts.n_batches_done:
                continue
            if alone is None:
                alone = self.unsplit(own, batch, parts.n_samples)
            taken = {one: p for one, p in own.items() if one not in alone}
            n = self.batched(batch, taken, adder, parts.n_samples)
            if alone:
                self.one_by_one(batch, n, alone, adder, parts.n_samples)
            parts.advance(n)
        parts.end()

    def batched(self, batch: Any, own: Mapping[str, nn.Parameter], taker: Taker, first: int) -> int:
        """Gradients of every sample of a batch from one forward pass; returns their number."""
        gradients = SampleGradients(self.model, own, taker, self.chunk)
        n = 0
        with gradients.capture():
            found = self.loss_fn(self.model, batch)
            for objective, last in _with_last(objectives(found, self.reading, self.fisher, self.seed, first)):
                n = objective.numel()
                gradients.backward(objective, last=last)
        if gradients.unserved:
            name, why = next(iter(gradients.unserved.items()))
            raise StatisticsError(
                f"parameter {name!r}: {why} in a batch of {n} samples, unlike in the first batch; expected "
                "one layout. Collect with batches of one sample."
            )
        return n

    def one_by_one(
        self, batch: Any, n: int, own: Mapping[str, nn.Parameter], taker: Taker, first: int
    ) -> None:
        """Gradients of parameters that no capture serves: a pass for every `chunk` samples by autograd."""
        chunk = self.chunk or n
        for start in range(0, n, chunk):
            cut = [sample_of(batch, k, n) for k in range(start, min(start + chunk, n))]
            with _requiring(own.values()):
                streams = [
                    objectives(self.loss_fn(self.model, one), self.reading, self.fisher, self.seed, first + k)
                    for k, one in enumerate(cut, start=start)
                ]
                for of_samples in zip(*streams, strict=True):
                    total = torch.stack([one.sum() for one in of_samples]).sum()
                    found = torch.autograd.grad(
                        total, list(own.values()), allow_unused=True, retain_graph=True
                    )
                    for (name, parameter), gradient in zip(own.items(), found, strict=True):
                        if gradient is not None:
                            taker.gradient(name, gradient.to(_wide(parameter)), len(cut))

    def unsplit(self, own: Mapping[str, nn.Parameter], batch: Any, first: int) -> dict[str, nn.Parameter]:
        """Parameters whose captured gradients of a batch do not add up to autograd's."""
        with _requiring(own.values()):
            objective = next(
                objectives(self.loss_fn(self.model, batch), self.reading, self.fisher, self.seed, first)
            )
            found: Sequence[Tensor | None] = [None] * len(own)
            if objective.requires_grad:
                found = torch.autograd.grad(objective.sum(), list(own.values()), allow_unused=True)
            else:
                self.check_graph(batch)
        rest = {
            name: torch.zeros(p.shape, dtype=_wide(p), device=p.device) if g is None else g.to(_wide(p))
            for (name, p), g in zip(own.items(), found, strict=True)
        }
        rest_of = _Rest(rest)
        rounding = _OUTSIDE * max(rest_of.sizes.values(), default=0.0)
        gradients = SampleGradients(self.model, own, rest_of, self.chunk)
        with gradients.capture():
            stream = objectives(self.loss_fn(self.model, batch), self.reading, self.fisher, self.seed, first)
            gradients.backward(next(stream), last=True)
        return {
            name: parameter
            for name, parameter in own.items()
            if name in gradients.unserved
            or not _norm(rest[name]) <= _agreement(parameter) * rest_of.sizes[name] + rounding
        }

    def check_graph(self, batch: Any) -> None:
        """Raise unless the losses depend on parameters, if not on those of this pass.

        Raises:
            ArgumentError: they were computed without a graph.
        """
        with _requiring(p for p in self.model.parameters() if p.is_floating_point()):
            losses = self.loss_fn(self.model, batch)
            if isinstance(losses, Tensor) and not losses.requires_grad:
                raise ArgumentError(
                    "what loss_fn returned does not depend on any parameter, or loss_fn detached it; "
                    "expected a differentiable function of the model's outputs, without torch.no_grad()."
                )


class _Adder:
    """Adds the importance of gradients to the sums."""

    def __init__(
        self,
        kind: str,
        fisher: str,
        own: Mapping[str, nn.Parameter],
        origin: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
    ) -> None:
        self._kind, self._origin, self._sums = kind, origin, sums
        self._weights = {name: parameter.detach().contiguous() for name, parameter in own.items()}
        self._divides = kind == "fisher" and fisher != "mergelm"

    def gradient(self, name: str, gradient: Tensor, n: int) -> None:
        total, factor = self._sums[name], gradient
        if total.dtype == torch.float32:
            score(gradient, out=total, scale=self._scale(n), **self._operands(name))
            return
        if self._kind != "fisher":
            factor = self._weights[name] - self._origin.get(name, 0.0)
        total += (gradient * factor).abs() * self._scale(n)

    def layer(self, name: str, e: Sequence[Tensor], a: Sequence[Tensor], ns: Sequence[int]) -> None:
        scales = [self._scale(n) for n in ns]
        score(e, activations=a, out=self._sums[name], scale=scales, **self._operands(name))

    def embedding(self, name: str, e: Sequence[Tensor], tokens: Sequence[Tensor], ns: Sequence[int]) -> None:
        scales = [self._scale(n) for n in ns]
        score(e, tokens=tokens, out=self._sums[name], scale=scales, **self._operands(name))

    def _scale(self, n: int) -> float:
        """(Σ g)² / n of a Fisher's micro-batch."""
        return 1.0 / n if self._divides else 1.0

    def _operands(self, name: str) -> dict[str, Any]:
        own = None if self._kind == "fisher" else self._weights[name]
        return {"weight": own, "kind": KINDS[self._kind], "base": self._origin.get(name)}


class _Rest:
    """What is left of whole gradients once those of the samples are taken away."""

    def __init__(self, rest: dict[str, Tensor]) -> None:
        self._rest = rest
        self.sizes = {name: _norm(gradient) for name, gradient in rest.items()}

    def gradient(self, name: str, gradient: Tensor, n: int) -> None:
        self._rest[name] -= gradient
        self.sizes[name] = max(self.sizes[name], _norm(gradient))

    def layer(self, name: str, e: Sequence[Tensor], a: Sequence[Tensor], ns: Sequence[int]) -> None:
        for one, inputs, n in zip(e, a, ns, strict=True):
            self.gradient(name, one.t().to(torch.float32) @ inputs.to(torch.float32), n)

    def embedding(self, name: str, e: Sequence[Tensor], tokens: Sequence[Tensor], ns: Sequence[int]) -> None:
        for one, those, n in zip(e, tokens, ns, strict=True):
            gradient = torch.zeros_like(self._rest[name])
            self.gradient(name, gradient.index_add_(0, those, one.to(torch.float32)), n)


# -- arguments --------------------------------------------------------------------------------------


def _reading(kind: str, fisher: str, base: object) -> FisherReading | None:
    check_name("kind", kind, KINDS, "collect")
    check_name("fisher", fisher, FISHERS, "collect")
    if (kind == "delta") != (base is not None):
        found = "None" if base is None else "given"
        raise ArgumentError(f"collect: kind={kind!r} and base is {found}; expected a base for 'delta' only.")
    return FISHERS[fisher] if kind == "fisher" else None


def _chunk(per_sample: bool, micro_batch: int | None, reading: FisherReading | None) -> int:
    """Samples whose gradients are added before anything is done with them; 0: all of a batch."""
    if micro_batch is not None:
        if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
            raise ArgumentError(f"collect: micro_batch is {micro_batch!r}; expected a positive integer.")
        if reading is not None and not reading.chunk:
            raise ArgumentError(
                "collect: fisher='mergelm' adds the gradients of a batch; micro_batch has no place."
            )
        return micro_batch
    if reading is not None and not reading.chunk:
        return 0
    return 1 if per_sample else 0


def _chosen(
    model: nn.Module, parameters: Callable[[str], bool] | Iterable[str] | None
) -> dict[str, nn.Parameter]:
    """The parameters to collect for, in the order of the model.

    Raises:
        StateDictError: a name that the model has not.
        ArgumentError: none is left.
    """
    known = {name: p for name, p in parameter_names(model).items() if p.is_floating_point()}
    if parameters is None:
        chosen = known
    elif callable(parameters):
        chosen = {name: p for name, p in known.items() if parameters(name)}
    else:
        wanted = set(parameters)
        if missing := sorted(wanted - set(known)):
            raise StateDictError(
                f"collect: parameters names {missing[0]!r}, which the model has not; expected floating-point "
                f"parameters of it, such as {next(iter(known), 'none')!r}."
            )
        chosen = {name: p for name, p in known.items() if name in wanted}
    if not chosen:
        raise ArgumentError(
            f"collect: no parameter is chosen, of {len(known)} floating-point ones; expected one at least."
        )
    return chosen


def _origin(base: Weights | None, chosen: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """θ₀ of the chosen parameters."""
    if base is None:
        return {}
    found = named_tensors(base, "base")
    origin = {}
    for name, parameter in chosen.items():
        if name not in found:
            raise StateDictError(
                f"base lacks the parameter {name!r}; expected every one that is collected for."
            )
        if found[name].shape != parameter.shape:
            raise ShapeError(
                f"base: {name!r} has shape {list(found[name].shape)}, the model's has "
                f"{list(parameter.shape)}; expected equal ones."
            )
        origin[name] = found[name].detach().to(parameter.device).contiguous()
    return origin


def _groups(chosen: Mapping[str, nn.Parameter], layers_at_a_time: int | None) -> list[list[str]]:
    """Names that are collected in one pass: those of so many modules."""
    if layers_at_a_time is None:
        return [list(chosen)]
    if isinstance(layers_at_a_time, bool) or not isinstance(layers_at_a_time, int) or layers_at_a_time < 1:
        raise ArgumentError(
            f"collect: layers_at_a_time is {layers_at_a_time!r}; expected a positive integer."
        )
    by_module: dict[str, list[str]] = {}
    for name in chosen:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    modules = list(by_module.values())
    steps = range(0, len(modules), layers_at_a_time)
    return [[name for names in modules[at : at + layers_at_a_time] for name in names] for at in steps]


class _Replay:
    """Batches that can be gone through as often as there are groups.

    Raises:
        ArgumentError: they can be iterated once, and several passes are needed.
    """

    def __init__(self, batches: Batches, n_passes: int) -> None:
        self._batches = batches
        if not callable(batches) and n_passes > 1 and iter(batches) is batches:
            raise ArgumentError(
                f"batches is a {type(batches).__name__}, which can be iterated once, and {n_passes} passes "
                "are needed; expected a list, a data loader, or a function that starts them anew."
            )

    def start(self) -> Iterable[Any]:
        return self._batches() if callable(self._batches) else self._batches


# -- the model meanwhile ------------------------------------------------------------------------------


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters, until it ends."""
    training = {module: module.training for module in model.modules()}
    requiring = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in requiring.items():
            parameter.requires_grad_(flag)


@contextmanager
def _requiring(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


def _with_last(items: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Items, and whether each is the last."""
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _agreement(parameter: Tensor) -> float:
    """Relative difference of two ways to the same gradient that is rounding."""
    return 3e-2 if parameter.dtype.itemsize == 2 else 1e-3
