"""Fine-tuning, with and without the penalty, and in the tangent space of the base; accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from bench.quality.suites import Batch, Suite, Training, batches, cut, n_samples
from tvfast.curvature import KroneckerPenalty

_EVALUATED_AT_ONCE = 256


def train(
    suite: Suite,
    model: nn.Module,
    data: Batch,
    training: Training,
    seed: int,
    penalty: KroneckerPenalty | None = None,
) -> None:
    """Adam on cross-entropy in random batches, learning rate to 0 along a cosine; modifies the model."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for _ in range(training.steps):
        rows = torch.randint(n_samples(data), (training.batch_size,), generator=generator)
        batch = cut(data, rows)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(suite.outputs(model, batch), batch["labels"])
        torch.autograd.backward(loss)
        if penalty is not None:
            penalty.add_gradients(model.vector() if isinstance(model, Tangent) else model)
        optimizer.step()
        schedule.step()


def accuracy(suite: Suite, model: nn.Module, data: Batch) -> float:
    """Share of samples whose largest output is their class, in percent."""
    right = 0
    with torch.no_grad():
        for batch in batches(data, _EVALUATED_AT_ONCE):
            right += int((suite.outputs(model, batch).argmax(1) == batch["labels"]).sum())
    return 100.0 * right / n_samples(data)


class Tangent(nn.Module):
    """f(x; θ₀) + J(x; θ₀) τ: a network whose parameters are a task vector, named as the base's are."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = [base.requires_grad_(False)]  # in a list: not a module of this one
        self._names = {name.replace(".", "_"): name for name, _ in base.named_parameters()}
        for name, parameter in zip(self._names, base.parameters(), strict=True):
            self.register_parameter(name, nn.Parameter(torch.zeros_like(parameter)))

    def vector(self) -> dict[str, nn.Parameter]:
        """τ by the base's names."""
        own = dict(self.named_parameters())
        return {name: own[local] for local, name in self._names.items()}

    def forward(self, x: Tensor) -> Tensor:
        (base,) = self._base
        start = {name: parameter.detach() for name, parameter in base.named_parameters()}

        def run(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(base, parameters, (x,))
            return found

        run_: Callable[[dict[str, Tensor]], Tensor] = run
        at_base, moved = jvp(run_, (start,), (dict(self.vector()),))
        total: Tensor = at_base + moved
        return total
