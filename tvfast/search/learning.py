"""AdaMerging: coefficients that make predictions on unlabelled data certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvfast.errors import ArgumentError, EvaluationError
from tvfast.live import LiveMerge


@dataclass(frozen=True, slots=True)
class Learned:
    """What AdaMerging found.

    Attributes:
        coefficients: [T], or [T, G] in the order of `LiveMerge.groups`; float64, on the CPU.
        losses: entropy summed over tasks, before each step.
    """

    coefficients: Tensor
    losses: tuple[float, ...]


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of softmax distributions, in nats: logits [..., C] -> []; classes of -inf count 0."""
    logarithms = logits.float().log_softmax(-1)
    finite = logarithms.masked_fill(logarithms == -torch.inf, 0.0)  # 0 ln 0 = 0, in the gradient too
    return -(logarithms.exp() * finite).sum(-1).mean()


def adamerging(
    live: LiveMerge,
    outputs: Callable[[int, Any], Tensor],
    batches: Sequence[Iterable[Any]],
    *,
    layerwise: bool = False,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    start: float = 0.3,
    loss: Callable[[Tensor], Tensor] = entropy,
) -> Learned:
    """Learn the coefficients of a live merge by minimising the entropy of its predictions, summed over tasks.

    min_w Σ_t H(softmax f_t(x; θ₀ + Σ_k w_k τ_k)), x unlabelled data of task t, by Adam on w alone: each step
    is one `set`, one forward and backward pass per task, and one pass for the gradient. No graph goes through
    the merge.

    Args:
        live: of parameters that require gradients, by a method whose coefficients have one
            ("task_arithmetic", "breadcrumbs": trimmed task vectors, "dare_linear", "della_linear"). Left at
            the coefficients that are returned; leaving its `with` block puts the base back. Modes such as
            dropout are the caller's.
        outputs: (t, batch) -> logits [N, C] of task t by the live model, with its own head.
        batches: of each task, unlabelled; begun again when they end. What is a generator must not end.
        layerwise: a coefficient per task and group of `live` instead of one per task.
        steps, learning_rate, start: of Adam; the defaults are the authors'.
        loss: of logits; less is better.

    Returns:
        The last coefficients and the losses.

    Raises:
        ArgumentError: no tasks, no data, steps below 1, or a method without a gradient.
        EvaluationError: a loss that is not finite.

    Source: Yang et al. 2024, arXiv:2310.02575. Their AdaMerging++ works on task vectors that TIES has
        trimmed: `LiveMerge(..., method="breadcrumbs", density=0.2, gamma=0.0)` trims; signs are not elected.
    """
    if steps < 1 or not batches:
        raise ArgumentError(f"{steps} steps on {len(batches)} tasks; expected at least one of each.")
    shape = (live.n_tasks, len(live.groups)) if layerwise else (live.n_tasks,)
    weights = torch.nn.Parameter(torch.full(shape, start, dtype=torch.float64))
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    streams = [_again(task, found) for task, found in enumerate(batches)]
    losses = []
    for step in range(steps):
        live.set(weights)
        live.zero_grad()
        total = 0.0
        for task, stream in enumerate(streams):
            found = loss(outputs(task, next(stream)))
            found.backward()  # type: ignore[no-untyped-call]
            total += float(found.detach())
        if not abs(total) < float("inf"):
            raise EvaluationError(f"step {step}: the loss is {total}; expected a finite number.")
        losses.append(total)
        weights.grad = live.gradient()
        optimiser.step()
    live.zero_grad()
    live.set(weights)
    return Learned(weights.detach().clone(), tuple(losses))


def _again(task: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches without an end."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ArgumentError(f"batches[{task}] has no batch; expected at least one, in every round.")
