"""Linear probes against scikit-learn's, and heads aligned before fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tvfast import analysis
from tvfast.errors import ArgumentError


def blobs(n: int = 300, n_classes: int = 3, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(n_classes, width, generator=generator)
    labels = torch.arange(n) % n_classes
    scale = torch.logspace(-3, 3, width)
    return (centres[labels] + torch.randn(n, width, generator=generator)) * scale + 5.0, labels


def test_it_is_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs()
    head = analysis.linear_probe(features, labels, decay=0.01)
    scaled = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    # theirs minimises C Σ loss + ‖W‖²/2, so C = 1 / (N decay)
    theirs = linear_model.LogisticRegression(C=1 / (len(labels) * 0.01), tol=1e-10, max_iter=5000)
    expected = torch.tensor(theirs.fit(scaled.numpy(), labels.numpy()).predict_proba(scaled.numpy()))
    found = head(features).double().softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found.argmax(-1) == labels).double().mean() > 0.9
    again = analysis.linear_probe(features, labels, decay=0.01)
    assert torch.equal(head.weight, again.weight)


def test_constant_features_and_classes_without_samples() -> None:
    features, labels = blobs()
    features[:, 3] = 7.0
    head = analysis.linear_probe(features, labels, n_classes=5)
    assert head.out_features == 5
    assert torch.equal(head.weight[:, 3], torch.zeros(5))
    assert set(head(features).argmax(-1).tolist()) == {0, 1, 2}


def test_a_head_is_aligned_on_batches_and_frozen() -> None:
    features, labels = blobs()
    backbone = nn.Linear(8, 8)
    batches = [(features[k : k + 100] / 100, labels[k : k + 100]) for k in (0, 100, 200)]
    head = analysis.aligned_head(backbone, batches)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with torch.no_grad():
        whole = analysis.linear_probe(backbone(features / 100), labels)
    torch.testing.assert_close(head.weight, whole.weight, rtol=1e-4, atol=1e-5)
    assert backbone.weight.grad is None


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.long), {}, r"\[3, 2\] and labels \[2\]"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long), {}, "N at least 1"),
        (
            torch.ones(2, 2),
            torch.tensor([0, 2]),
            {"n_classes": 2},
            r"from 0 to 2; expected integers in \[0, 2\)",
        ),
        (torch.ones(2, 2), torch.tensor([-1, 0]), {}, "labels from -1"),
        (torch.tensor([[torch.nan]]), torch.tensor([0]), {}, "NaN or infinity"),
        (torch.ones(2, 2), torch.tensor([0, 1]), {"decay": 0.0}, "decay above 0"),
    ],
)
def test_wrong_arguments(features: Tensor, labels: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        analysis.linear_probe(features, labels, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no batch"):
        analysis.aligned_head(nn.Identity(), [])
