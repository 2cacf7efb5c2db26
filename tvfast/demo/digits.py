"""Three tasks out of scikit-learn's digits: 1797 grey images of 8 x 8 pixels, which ship in that package.

Each task is to read the digits of one faulty scanner, which leaves a white line along one edge of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EDGES = {
    "line at top": (slice(0, 1), slice(None)),
    "line at bottom": (slice(7, 8), slice(None)),
    "line at left": (slice(None), slice(0, 1)),
}
TASKS = tuple(_EDGES)

_N_TEST = 600
_N_VALIDATION = 200
_SIDE = 8
_WHITE = 16.0


@dataclass(frozen=True, slots=True)
class Images:
    """Pixels in [0, 1], float32 [n, 64], and the digits they show, int64 [n]."""

    pixels: Tensor
    digits: Tensor

    def of(self, task: str) -> Images:
        """The same images from the scanner of a task."""
        grid = self.pixels.reshape(-1, _SIDE, _SIDE).clone()
        rows, columns = _EDGES[task]
        grid[:, rows, columns] = 1.0
        return Images(grid.reshape(-1, _SIDE * _SIDE), self.digits)


@dataclass(frozen=True, slots=True)
class Digits:
    """Disjoint parts of the data set. The validation part chooses λ, the test part is only reported."""

    train: Images
    validation: Images
    test: Images


def load(seed: int) -> Digits:
    """The data set, shuffled by `seed` and split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.data).to(torch.float32) / _WHITE
    digits = torch.from_numpy(found.target).to(torch.int64)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    ends = (_N_TEST, _N_TEST + _N_VALIDATION)
    test, validation, train = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
    return Digits(*(Images(pixels[part], digits[part]) for part in (train, validation, test)))
