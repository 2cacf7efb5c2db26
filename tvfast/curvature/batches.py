"""The data of a collection: batches that are passed several times, their samples and their masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor

from tvfast.errors import ArgumentError

Mask = str | Callable[[Any], Tensor | Sequence[Tensor] | None] | None
"""The entry of a batch, or the function of it, that marks real tokens."""


class Batches:
    """The data, once for each group of layers.

    Attributes:
        length: batches; 0: not known.
    """

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        self._make: Callable[[], Iterable[Any]] | None = batches if callable(batches) else None
        self._source: Iterable[Any] = () if callable(batches) else batches
        if not callable(batches) and not isinstance(batches, Iterable):
            raise ArgumentError(
                f"batches is a {type(batches).__name__}; expected an iterable of batches, or a function that "
                "returns one."
            )
        self._once = isinstance(batches, Iterator)
        self.length = len(batches) if isinstance(batches, Sized) else 0

    def first(self) -> Any:
        """The first batch, which is not lost."""
        iterator = iter(self._make() if self._make else self._source)
        found = next(iterator, None)
        if found is None:
            raise ArgumentError("batches is empty; expected at least one batch.")
        if self._once:
            self._source = itertools.chain([found], iterator)
        return found

    def check(self, n_groups: int) -> None:
        """Raise if more than one pass is needed over what can be iterated once."""
        if self._once and n_groups > 1:
            raise ArgumentError(
                f"batches is an iterator, and memory= asks for {n_groups} passes over the data; expected a "
                "list, a loader, or a function that returns an iterator."
            )

    def again(self, *, skip: int) -> Iterator[Any]:
        """All batches from number `skip` on."""
        return itertools.islice(iter(self._make() if self._make else self._source), skip, None)


def n_samples_of(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        ArgumentError: there is none.
    """
    found = _first_tensor(batch)
    if found is None or not found.shape[0]:
        raise ArgumentError(
            f"a batch is a {type(batch).__name__} without a tensor of at least one sample; expected a "
            "tensor, or a mapping or sequence that begins with one."
        )
    return found.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        return next((x for item in batch if (x := _first_tensor(item)) is not None), None)
    return None


def masks_of(mask: Mask, batch: Any) -> list[Tensor]:
    """Masks of real tokens, [N, R] each.

    Raises:
        ArgumentError: of another number of dimensions.
    """
    if mask is None:
        return []
    if callable(mask):
        found = mask(batch)
    else:
        found = batch.get(mask) if isinstance(batch, Mapping) else None
    if found is None:
        return []
    masks = [found] if isinstance(found, Tensor) else list(found)
    for one in masks:
        if one.dim() != 2:
            raise ArgumentError(f"a mask has shape {list(one.shape)}; expected [N, R], true for real tokens.")
    return [one.bool() for one in masks]
