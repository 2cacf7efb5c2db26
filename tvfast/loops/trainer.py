"""Tuning by transformers' Trainer, as the loops call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tvfast.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

T = TypeVar("T")


def with_trainer(make: Callable[[Any, T], Trainer]) -> Callable[[Any, T], None]:
    """A `tune` for `alternate` that trains with transformers' Trainer.

    Args:
        make: makes the Trainer of one turn, from the model and the task. It must train that very model. Its
            arguments' `seed` orders the data; nobody needs checkpoints of single turns: `save_strategy="no"`.

    Returns:
        What calls `make`, trains, and takes from the model what accelerate has put around it.

    Raises:
        ArgumentError: in a turn, if the Trainer is for another model.
    """

    def tune(model: nn.Module, task: T) -> None:
        trainer = make(model, task)
        accelerator = trainer.accelerator
        if accelerator.unwrap_model(trainer.model) is not model:
            raise ArgumentError(
                "with_trainer: the Trainer has another model than the one that it was made with; expected "
                "Trainer(model=model, ...)."
            )
        try:
            trainer.train()
        finally:
            # Mixed precision replaces `forward`; left in place, every turn would wrap it once more.
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            accelerator.free_memory()

    return tune
