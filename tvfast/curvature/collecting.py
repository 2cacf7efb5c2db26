"""`collect`: Kronecker factors of a model on data, groups of layers at a time, into a file or memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.curvature.batches import Batches, Mask, masks_of, n_samples_of
from tvfast.curvature.probes import Losses, Probe
from tvfast.curvature.progress import Checkpoint, Settings
from tvfast.curvature.sites import KINDS, find_sites
from tvfast.curvature.sums import Form, Sum, make_sum
from tvfast.curvature.tracking import CONVENTIONS, Convention, Step, Tracker, group, vector_record
from tvfast.errors import ArgumentError, StatisticsError
from tvfast.factors.records import Statistics
from tvfast.statistics import Document, Record
from tvfast.statistics.tensors import model_identity, parameter_names

Report = Callable[[int, int], None]

_STORAGE = ("F32", "F64", "BF16", "F16")


def collect(
    model: nn.Module,
    loss_fn_or_probe: Probe | Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    convention: str = "tak",
    form: str = "dense",
    block: int = 64,
    rank: int = 1024,
    bias: bool | None = None,
    kinds: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    vectors: Sequence[str] = (),
    mask: Mask = "attention_mask",
    batch_first: bool = True,
    share: bool = True,
    memory: int | None = None,
    storage: str = "F32",
    seed: int = 0,
    name: str = "",
    content: bool = False,
    data: Mapping[str, Any] | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    progress: Report | None = None,
) -> Statistics:
    """The second moments A of layers' inputs and B of gradients at their outputs.

    For a linear layer with inputs a [R, i] and gradients e [R, o] of one sample's R tokens, A is the sum of a
    aᵀ and B that of e eᵀ; the curvature of its weight is B (x) A. `convention` says what the sums are divided
    by:

    - "tak": A and B by R and by samples, B by probes too; A has a column for the bias;
    - "kfac_expand": as "tak", but B is not divided by R;
    - "mats": both by tokens, no bias column;
    - "regmean": A by tokens; there is no B, and nothing is propagated back.

    The weight and the bias of a norm, and `vectors`, get a full block of their own each, divided by samples
    and probes.

    Args:
        model: any module; evaluated as in `eval()`. Its parameters, their `requires_grad` and its mode are as
            before when this returns.
        loss_fn_or_probe: a function (model, batch) -> losses [N], or one of `Gaussian`, `SampledLabels`,
            `Exact`, `Losses`. For "regmean" any function that runs the model.
        batches: batches of any kind; the first tensor found in one gives N, its first dimension. Where memory
            asks for several groups of layers it is iterated once for each: pass a list, a loader or a
            function that returns an iterator.
        path: of the statistics file; None: in memory.
        form: "dense", "block" for diagonal blocks of side `block`, "root" for square roots of at most `rank`
            columns; rows beyond them are sampled by a hash of their place in the data.
        bias: whether A has a bias column where a layer has a bias; None: as the convention does.
        kinds: among "linear", "norm" and "embedding"; None: as the convention does. An embedding has a
            diagonal A, how often each row was looked up.
        layers, exclude: patterns of weight names, as "*.mlp.*"; layers None: all but the output head.
        vectors: names of parameters, such as a class token, whose gradient is taken sample by sample: one
            more backward pass each.
        mask: of real tokens, [N, R]: the entry of a batch that is a mapping, or a function of a batch;
            several where lengths differ. Others enter nothing.
        batch_first: whether activations are [N, R, n]; False where they are [R, N, n].
        share: layers with the very same input tensor, as q, k and v, have one A, stored once.
        memory: bound of the memory for sums, bytes; None: all layers in one pass.
        storage: of the sums in the file: "F32", "F64", "BF16" or "F16".
        seed: of the rows that a square root samples.
        name: of the model, for people.
        content: digest the model's values, too, so that a state is not continued with others.
        data: what the file says of the data: path, split, seed.
        checkpoint_every: batches between two states on disk, beside `path`; 0: none.
        resume: continue from such a state if there is one.
        progress: is called with the number of batches done and planned, over all groups; 0 planned: not
            known.

    Returns:
        The statistics: a mapping from parameter names to `Curvature`; `left_out` says what has none, and why.

    Raises:
        ArgumentError: an argument, or data that do not fit the model.
        StatisticsError: a result that is not finite, or a state of another collection.
        OutputError: the file cannot be written.

    Notes:
        Products are float32 (float64 where activations are), sums float64. The sums do not depend on how the
        data are cut into batches, up to the rounding of the model's own forward pass.

    Source: that of each of `CONVENTIONS`; docs/curvature.md compares them.
    """
    chosen = _convention(convention)
    if storage not in _STORAGE:
        raise ArgumentError(f"storage is {storage!r}; expected one of {', '.join(_STORAGE)}.")
    probe = loss_fn_or_probe if isinstance(loss_fn_or_probe, Probe) else None
    if probe is None and not callable(loss_fn_or_probe):
        raise ArgumentError(
            f"loss_fn_or_probe is a {type(loss_fn_or_probe).__name__}; expected a function (model, batch) -> "
            "losses [N], or a probe such as tvfast.curvature.Gaussian."
        )
    run = _Collection(
        model=model,
        probe=probe or Losses(loss_fn_or_probe),  # type: ignore[arg-type]
        batches=Batches(batches),
        convention=chosen,
        form=Form(form, block, rank),
        step=Step(batch_first=batch_first, n_draws=probe.n_probes if probe else 1),
        mask=mask,
        seed=seed,
        progress=progress,
    )
    sites, left_out = find_sites(model, _kinds(kinds, chosen), layers, exclude)
    has_bias = chosen.bias if bias is None else bias
    trackers = [
        Tracker(site, chosen, run.form, has_bias and site.bias is not None, run.step) for site in sites
    ]
    run.vectors = _vectors(model, vectors, chosen)
    document = Document(
        model_identity(model, name, content=content),
        () if data is None else (dict(data),),
        {
            "convention": convention,
            **(probe.describe() if probe else {"probe": "none" if chosen.b_count is None else "losses"}),
        },
    )
    settings = Settings(
        document=document,
        path=None if path is None else os.fspath(path),
        storage=storage,
        every=checkpoint_every,
        resume=resume,
        said={"form": form, "block": block, "rank": rank, "seed": seed, "memory": memory},
    )
    with run.prepared():
        order = run.scout(trackers, share)
        groups = group(order, float("inf") if memory is None else memory)
        run.batches.check(len(groups))
        return run.all(groups, trackers, settings, left_out)


@dataclass(eq=False)
class _Collection:
    """State of one collection."""

    model: nn.Module
    probe: Probe
    batches: Batches
    convention: Convention
    form: Form
    step: Step
    mask: Mask
    seed: int
    progress: Report | None
    vectors: dict[str, nn.Parameter] = field(default_factory=dict)
    vector_sums: dict[str, Sum] = field(default_factory=dict)
    n_samples: int = 0

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model in evaluation mode, with gradients only for `vectors`; afterwards as it was."""
        modes = {module: module.training for module in self.model.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        chosen = {id(parameter) for parameter in self.vectors.values()}
        try:
            self.model.eval()
            for parameter in wanted:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)
            for module, training in modes.items():
                module.training = training

    def scout(self, trackers: list[Tracker], share: bool) -> list[Tracker]:
        """Run the first batch once to see the order of layers and which share their input."""
        order: list[Tracker] = []
        inputs: list[tuple[weakref.ref[Tensor], int, Tracker]] = []

        def look(tracker: Tracker, x: Tensor) -> None:
            if tracker in order:
                return
            order.append(tracker)
            for held, version, other in inputs:
                if (
                    held() is x
                    and version == x._version
                    and other.n_a == tracker.n_a
                    and other.bias == tracker.bias
                ):
                    tracker.leader = other
                    return
            if share and tracker.site.kind == "linear":
                inputs.append((weakref.ref(x), x._version, tracker))

        batch = self.batches.first()
        with ExitStack() as hooks, torch.no_grad():
            for tracker in trackers:
                hook = tracker.site.module.register_forward_pre_hook(
                    lambda module, args, kwargs, t=tracker: look(t, _input(args, kwargs)), with_kwargs=True
                )
                hooks.callback(hook.remove)
            self.step.n_samples = n_samples_of(batch)
            self._forward(batch)
        return order + [t for t in trackers if t not in order]

    def all(
        self, groups: list[list[Tracker]], trackers: list[Tracker], settings: Settings, left_out: list[str]
    ) -> Statistics:
        """Every group in turn; then the records of all."""
        checkpoint = Checkpoint(settings)
        begin = checkpoint.open()
        planned = self.batches.length * len(groups)
        for index in range(begin.group, len(groups)):
            members = groups[index]
            for tracker in members:
                tracker.open(self.seed)
            if index == 0:
                self._open_vectors()
            sums = _named_sums(members, self.vector_sums if index == 0 else {})
            done = checkpoint.restore(sums, members) if index == begin.group else 0
            self.n_samples = checkpoint.n_samples if done else 0
            with self._hooks(members):
                for number, batch in enumerate(self.batches.again(skip=done), start=done):
                    self._batch(batch, members, index == 0)
                    if self.progress is not None:
                        self.progress(index * self.batches.length + number + 1, planned)
                    if checkpoint.due(number + 1):
                        checkpoint.save(sums, members, index, number + 1, self.n_samples)
            if self.n_samples == 0:
                raise ArgumentError("batches is empty; expected at least one batch.")
            checkpoint.finish_group(index, list(self._records(members, settings.storage, index == 0)))
            for tracker in members:
                tracker.sums.clear()
            left_out += [f"{t.name}: no data reached it" for t in members if not t.reached]
        return checkpoint.finish(tuple(left_out))

    def _records(self, members: list[Tracker], storage: str, first: bool) -> Iterator[Record]:
        for tracker in members:
            if tracker.reached:
                yield from tracker.records(storage)
        for name, found in self.vector_sums.items() if first else ():
            counts = {"samples": self.n_samples, "draws": self.n_samples * self.step.n_draws}
            yield vector_record(name, tuple(self.vectors[name].shape), found, counts, storage)

    def _open_vectors(self) -> None:
        for name, parameter in self.vectors.items():
            self.vector_sums[name] = make_sum(parameter.numel(), self.form, self.seed, parameter.device)

    @contextmanager
    def _hooks(self, members: list[Tracker]) -> Iterator[None]:
        with ExitStack() as hooks:
            for tracker in members:
                hook = tracker.site.module.register_forward_hook(
                    lambda module, args, kwargs, output, t=tracker: self._on_forward(
                        t, _input(args, kwargs), output
                    ),
                    with_kwargs=True,
                )
                hooks.callback(hook.remove)
            yield

    def _on_forward(self, tracker: Tracker, x: Tensor, output: Tensor) -> Tensor | None:
        if not self.step.active:
            return None
        with torch.no_grad():
            tracker.forward(x)
        if not torch.is_grad_enabled():
            return None
        replaced = None
        if not output.requires_grad:
            # Where no parameter before it has a gradient, the graph begins here. A clone, so that what
            # follows may change it in place.
            output = replaced = output.detach().requires_grad_().clone()

        def on_backward(gradient: Tensor) -> None:
            if self.step.active:
                with torch.no_grad():
                    tracker.backward(gradient)

        output.register_hook(on_backward)  # type: ignore[no-untyped-call]
        return replaced

    def _batch(self, batch: Any, members: list[Tracker], first_group: bool) -> None:
        step = self.step
        step.n_samples, step.first, step.probe = n_samples_of(batch), self.n_samples, 0
        step.masks = masks_of(self.mask, batch)
        step.active = True
        try:
            if self.convention.b_count is None:
                with torch.no_grad():
                    self._forward(batch)
            else:
                self._propagate(batch, first_group)
        finally:
            step.active = False
            for tracker in members:
                tracker.end_batch()
        self.n_samples += step.n_samples

    def _forward(self, batch: Any) -> None:
        if isinstance(self.probe, Losses):
            self.probe.loss(self.model, batch)  # of "regmean" whatever it returns
        else:
            self.probe.run(self.model, batch, 0)

    def _propagate(self, batch: Any, first_group: bool) -> None:
        with torch.enable_grad():
            found = self.probe.run(self.model, batch, self.step.first)
        f = found.outputs
        if f.shape[0] != self.step.n_samples:
            raise ArgumentError(
                f"the outputs have shape {list(f.shape)} for a batch of {self.step.n_samples} samples; "
                "expected one row per sample. Return losses or features of each sample, not their mean."
            )
        if not f.requires_grad:
            raise ArgumentError(
                "the outputs do not depend on any layer that is collected, or the function detached them; "
                "expected a differentiable function of the model's outputs."
            )
        if not bool(torch.isfinite(f.detach()).all()):
            raise StatisticsError(
                f"samples {self.step.first} to {self.step.first + self.step.n_samples - 1}: the outputs hold "
                "NaN or infinity; expected finite ones. Look at the data, or run the model in float32."
            )
        for number, direction in enumerate(found.directions):
            self.step.probe = number
            if self.vectors and first_group:
                self._vectors_of(f, direction)
            torch.autograd.backward([f], [direction], retain_graph=number + 1 < found.n_directions)
        for parameter in self.vectors.values():
            parameter.grad = None

    def _vectors_of(self, f: Tensor, direction: Tensor) -> None:
        """Gradients of vectors, sample by sample."""
        self.step.active = False
        parameters = list(self.vectors.values())
        rows: dict[str, list[Tensor]] = {name: [] for name in self.vectors}
        for sample in range(self.step.n_samples):
            one = torch.zeros_like(direction)
            one[sample] = direction[sample]
            found = torch.autograd.grad(f, parameters, one, retain_graph=True, allow_unused=True)
            for name, parameter, gradient in zip(rows, parameters, found, strict=True):
                row = torch.zeros_like(parameter) if gradient is None else gradient
                rows[name].append(row.detach().reshape(-1).to(torch.promote_types(row.dtype, torch.float32)))
        self.step.active = True
        keys = torch.arange(self.step.n_samples) + self.step.first
        for name, found_rows in rows.items():
            stacked = torch.stack(found_rows)
            self.vector_sums[name].add(stacked, 1.0, keys.to(stacked.device) ^ (self.step.probe << 56))


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ArgumentError(f"convention is {name!r}; expected one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


def _kinds(kinds: Sequence[str] | None, convention: Convention) -> tuple[str, ...]:
    if kinds is None:
        return convention.kinds
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(f"kinds has {kind!r}; expected some of {', '.join(KINDS)}.")
    return tuple(kinds)


def _vectors(model: nn.Module, names: Sequence[str], convention: Convention) -> dict[str, nn.Parameter]:
    known = parameter_names(model)
    for name in names:
        if name not in known:
            raise ArgumentError(f"vectors has {name!r}, which is no parameter of the model.")
        if convention.b_count is None:
            raise ArgumentError("vectors need gradients, which this convention does not take; expected none.")
    return {name: known[name] for name in names}


def _named_sums(members: list[Tracker], vectors: Mapping[str, Sum]) -> dict[str, Sum]:
    named = {f"{t.name}:{role}": found for t in members for role, found in t.sums.items()}
    return {**named, **{f"{name}:F": found for name, found in vectors.items()}}


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if found is None:
        raise ArgumentError("a layer was called without a tensor; exclude it.")
    return found
