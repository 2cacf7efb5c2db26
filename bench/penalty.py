"""The penalty of one layer, the matrix products in it, and autograd: `python -m bench.penalty`.

One process, one thread, processor time; the three in turn, medians of their ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tvfast.curvature import Curvature, KroneckerPenalty
from tvfast.factors import Dense

SIDE = 4096
GOALS = {"two sgemms": 1.25, "autograd": 2.5}
"""At most so many times the products; at least so many times faster than autograd."""

Run = Callable[[], object]


def second_moment(side: int, seed: int) -> Tensor:
    """A symmetric matrix [side, side]; its values do not matter here."""
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(seed)) / side
    return square + square.T


def penalty_row(base: nn.Linear, model: nn.Linear, a: Tensor, b: Tensor) -> Run:
    """Value, and gradient added to `.grad`."""
    one = Curvature("weight", tuple(base.weight.shape), Dense(a), Dense(b), None, None, False, 1.0)
    penalty = KroneckerPenalty({"weight": one}, base, scale=0.1)
    model.weight.grad = torch.zeros_like(model.weight)
    return lambda: penalty.add_gradients(model)


def gemms_row(x: Tensor, a: Tensor, b: Tensor) -> Run:
    """B (X A) alone, into memory that is there."""
    half, product = torch.zeros_like(x), torch.zeros_like(x)

    def run() -> None:
        torch.mm(x, a, out=half)
        torch.mm(b, half, out=product)

    return run


def autograd_row(base: nn.Linear, model: nn.Linear, a: Tensor, b: Tensor) -> Run:
    """trace(B X A Xᵀ) and its gradient, as the authors' code has it."""
    weight = model.weight.detach().clone().requires_grad_()

    def run() -> None:
        weight.grad = None
        x = weight - base.weight.detach()
        (0.1 * torch.trace(b @ x @ a @ x.T)).backward()  # type: ignore[no-untyped-call]

    return run


def measure(n_out: int, n_in: int, rounds: int) -> dict[str, object]:
    """Medians over rounds of the ratios to the penalty's processor time."""
    torch.set_num_threads(1)
    base, model = nn.Linear(n_in, n_out, bias=False), nn.Linear(n_in, n_out, bias=False)
    a, b = second_moment(n_in, 1), second_moment(n_out, 2)
    rows = {
        "penalty": penalty_row(base, model, a, b),
        "two sgemms": gemms_row((model.weight - base.weight).detach(), a, b),
        "autograd": autograd_row(base, model, a, b),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    ratios = {
        name: [other / own for other, own in zip(seconds[name], seconds["penalty"], strict=True)]
        for name in rows
    }
    return {
        "shape": [n_out, n_in],
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "times the two sgemms": 1.0 / statistics.median(ratios["two sgemms"]),
        "times faster than autograd": statistics.median(ratios["autograd"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    found = measure(options.side, options.side, options.rounds)
    print(json.dumps(found, indent=2))
    met = (
        float(str(found["times the two sgemms"])) <= GOALS["two sgemms"]
        and float(str(found["times faster than autograd"])) >= GOALS["autograd"]
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
