"""Heads on frozen features: linear probes, and heads that are aligned before fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.errors import ArgumentError

_ITERATIONS = 200


def linear_probe(
    features: Tensor, labels: Tensor, *, n_classes: int | None = None, decay: float = 1e-3
) -> nn.Linear:
    """A linear classifier on fixed features: multinomial logistic regression.

    Minimises mean cross-entropy + decay/2 ‖W‖² over features that are centred and scaled to unit variance, by
    L-BFGS in float64; the scaling is folded into the layer, so that it takes features as they are.
    Deterministic; convex.

    Args:
        features: [N, D], of any floating dtype; labels: [N], integers from 0.
        n_classes: C; by default one more than the largest label.
        decay: weight of ‖W‖² on scaled features; the bias is free.

    Returns:
        A new layer D -> C, float32, on the features' device.

    Raises:
        ArgumentError: shapes that do not fit, no samples, labels outside [0, C), features that are not
            finite, or a decay that is not above 0.

    Source: the probes of Hazimeh et al. 2025, arXiv:2511.14569; regularisation and solver are ours.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ArgumentError(
            f"features {list(features.shape)} and labels {list(labels.shape)}; expected [N, D] and [N], N at "
            "least 1."
        )
    most = int(labels.max()) + 1
    classes = most if n_classes is None else n_classes
    if int(labels.min()) < 0 or most > classes or labels.is_floating_point():
        raise ArgumentError(
            f"labels from {int(labels.min())} to {most - 1}; expected integers in [0, {classes})."
        )
    x = features.detach().double()
    if not bool(torch.isfinite(x).all()) or not decay > 0.0:
        raise ArgumentError(
            f"features with NaN or infinity, or decay {decay}; expected finite ones, and decay above 0."
        )
    mean = x.mean(0)
    deviation = x.std(0, correction=0)
    scale = torch.where(deviation > 0.0, deviation, 1.0)
    weight, bias = _fitted((x - mean) / scale, labels.to(x.device), classes, decay)
    head = nn.Linear(x.shape[1], classes, device=x.device)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)
    return head


def aligned_head(
    features: Callable[[Any], Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    n_classes: int | None = None,
    decay: float = 1e-3,
) -> nn.Linear:
    """A head for a closed vocabulary, aligned with the base before the backbone is fine-tuned; frozen.

    Task arithmetic with models that have no text head: 1. this head on the pre-trained features of a task; 2.
    fine-tune the backbone with the head as it is; 3. add the backbones' task vectors; each task keeps its
    head.

    Args:
        features: inputs of a batch -> [N, D], by the frozen backbone; called without gradients.
        batches: (inputs, labels [N]).
        n_classes, decay: as in `linear_probe`.

    Raises:
        ArgumentError: no batch, or as `linear_probe`.

    Source: Hazimeh et al. 2025, arXiv:2511.14569 ("upfront head alignment"). That the head stays frozen in
        step 2 is our
        reading: unfreeze it with `requires_grad_()`.
    """
    with torch.no_grad():
        found = [(features(inputs), labels) for inputs, labels in batches]
    if not found:
        raise ArgumentError("batches has no batch; expected at least one.")
    head = linear_probe(
        torch.cat([one for one, _ in found]),
        torch.cat([labels for _, labels in found]),
        n_classes=n_classes,
        decay=decay,
    )
    return head.requires_grad_(False)


def _fitted(x: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + 0.5 * decay * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
