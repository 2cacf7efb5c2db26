"""Loops whose tuning is transformers' Trainer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.loops.networks import Task, equal, weights
from tests.loops.networks import tasks as all_tasks
from tvfast.errors import ArgumentError
from tvfast.loops import alternate, with_trainer

needs_accelerate = pytest.mark.skipif(not find_spec("accelerate"), reason="the Trainer needs accelerate")


class Classifier(nn.Module):
    """As the Trainer wants a model: a loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.25), nn.Linear(9, 3))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier()


def maker(folder: Path, **own: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    def make(model: nn.Module, data: Task) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            **own,
        )
        rows = [{"inputs": x, "labels": y} for x, y in zip(*data, strict=True)]
        return Trainer(model=model, args=arguments, train_dataset=rows)

    return make


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow)], ids=str)
def test_a_trainer_tunes_every_turn_and_leaves_the_model_bare(tmp_path: Path, own: dict[str, Any]) -> None:
    tasks = dict(list(all_tasks().items())[:2])
    model = classifier()
    forward = model.forward.__func__
    alternate(model, tasks, with_trainer(maker(tmp_path, **own)), rounds=2)
    assert model.forward.__func__ is forward, "no wrapper of accelerate is left"
    assert all(parameter.grad is None for parameter in model.parameters())
    again, before = classifier(), weights(classifier())
    alternate(again, tasks, with_trainer(maker(tmp_path, **own)), rounds=1, state=tmp_path / "state")
    alternate(again, tasks, with_trainer(maker(tmp_path, **own)), rounds=2, state=tmp_path / "state")
    assert equal(weights(again), weights(model))
    assert not equal(weights(model), before)


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    make = maker(tmp_path)
    with pytest.raises(ArgumentError, match="another model than the one that it was made with"):
        alternate(classifier(), all_tasks(), with_trainer(lambda _, data: make(classifier(), data)), rounds=1)
