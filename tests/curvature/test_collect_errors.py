"""What `collect` refuses, and what it leaves out and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.networks import features, network, tokens
from tvfast.curvature import (
    Exact,
    Gaussian,
    collect,
)
from tvfast.errors import ArgumentError, StatisticsError

X = tokens()


def refused(match: str, *args: Any, error: type[Exception] = ArgumentError, **kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        collect(*args, **kwargs)


def test_arguments_are_checked(tmp_path: Path) -> None:
    model, probe = network(), Gaussian(features)
    refused("convention is 'x'; expected one of tak", model, probe, [X], convention="x")
    refused("form is 'x'; expected one of dense", model, probe, [X], form="x")
    refused("block is 0", model, probe, [X], form="block", block=0)
    refused("storage is 'F8'", model, probe, [X], storage="F8")
    refused("kinds has 'conv'", model, probe, [X], kinds=["conv"])
    refused("layers has 'z.*', which fits no weight", model, probe, [X], layers=["z.*"])
    refused("no linear or norm module", model, probe, [X], exclude=["*"])
    refused("vectors has 'z'", model, probe, [X], vectors=["z"])
    refused("batches is a int", model, probe, 3)
    refused("batches is empty", model, probe, [])
    refused("a batch is a int without a tensor", model, probe, [3])
    refused("batches is an iterator, and memory= asks for", model, probe, iter([X]), memory=1000)
    refused("loss_fn_or_probe is a int", model, 3, [X])
    refused("need a path", model, probe, [X], checkpoint_every=1)
    refused("one loss per sample", model, lambda m, b: features(m, b), [X])
    refused("expected one row per sample", model, lambda m, b: features(m, b).square().mean(), [X])
    refused("do not depend on any layer", model, lambda m, b: torch.zeros(len(b)), [X])
    refused(
        r"sees 5 tokens per sample, the masks have 3", model, probe, [X], mask=lambda b: torch.ones(len(b), 3)
    )
    refused(r"a mask has shape \[12\]", model, probe, [X], mask=lambda b: torch.ones(len(b)))
    refused("expected \\[N, C\\]", nn.Linear(6, 6), Exact(features), [torch.zeros(2, 3, 6)])
    with pytest.raises(ArgumentError, match="n_probes is 0"):
        Gaussian(features, 0)
    with pytest.raises(ArgumentError, match="loss is 'x'"):
        Exact(features, "x")


def test_data_that_are_not_finite_are_named() -> None:
    model = nn.Linear(2, 2)
    x = torch.tensor([[1.0, 2.0], [float("inf"), 1.0]])
    refused(
        "samples 0 to 1: the outputs hold NaN or infinity", model, Exact(features), [x], error=StatisticsError
    )
    refused(
        "parameter 'weight': A holds NaN or infinity",
        model,
        lambda m, b: m(b),
        [x],
        convention="regmean",
        error=StatisticsError,
    )


def test_what_is_left_out_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = (
                nn.Embedding(5, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 5, bias=False),
            )
            self.unused = nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.body(self.embed(x))).mean(1)
            return found

    x = torch.randint(0, 5, (3, 2))
    found = collect(Tied(), Gaussian(features), [x])
    assert list(found) == ["body.weight"]
    assert any("the output head" in line for line in found.left_out)
    assert any(line.startswith("unused.weight: no data") for line in found.left_out)
    named = collect(Tied(), Gaussian(features), [x], kinds=("linear", "embedding"), layers=["*"])
    assert "embed.weight: tied, its first use is collected" in named.left_out


def test_a_shared_input_must_stay_shared() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            other = x + 1 if len(x) == 1 else x
            found: Tensor = self.a(x) + self.b(other)
            return found

    data = [torch.randn(2, 3), torch.randn(1, 3)]
    refused("b.weight: its input is not that of a.weight", Fickle(), Gaussian(features), data)
    collect(Fickle(), Gaussian(features), data, share=False)
