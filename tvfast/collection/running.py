"""`tvfast collect`: a transformers model on a file of samples, into a statistics file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tvfast.collection.configuration import KFAC, Configuration
from tvfast.collection.samples import Sample, digest_of, read_samples
from tvfast.curvature import collect as collect_factors
from tvfast.errors import ArgumentError, CheckpointError, RecipeError
from tvfast.importance import Progress, collect
from tvfast.importance.objectives import FISHERS, generator_of
from tvfast.statistics import StatisticsFile, open_statistics

_STORAGE = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}

IGNORED = -100
"""The label of a token that is not predicted, as in transformers."""

MASK_SHARE = 0.15
"""Share of tokens that a masked language model predicts: Devlin et al. 2019."""

_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}
_SUFFIXES = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
}
# Models that number positions from 0 and look them up for one row of the batch; given rows of its own, every
# sample has gradients of its own there, too.
_COUNTED_POSITIONS = ("bert", "gpt2", "electra", "albert")


def run(
    configuration: Configuration,
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> StatisticsFile:
    """Collect what a configuration asks for.

    Args:
        path: of the statistics file.
        resume, progress: as in `tvfast.importance.collect`.

    Raises:
        ImportError: transformers is not installed.
        RecipeError: the configuration does not fit the model.
        CheckpointError: model, tokenizer or data cannot be read.
        StatisticsError, OutputError: as `tvfast.importance.collect`.
    """
    transformers = _transformers()
    task = configuration.task or _task(transformers, configuration)
    model = _loaded(transformers, configuration, configuration.model, task)
    base = (
        None if configuration.base is None else _loaded(transformers, configuration, configuration.base, task)
    )
    encoder = Encoder.of(transformers, configuration, task, model)
    if configuration.kind == KFAC:
        return _factors(model, encoder, path, resume=resume, progress=progress)
    wanted = configuration.parameters
    chosen = (lambda name: any(part in name for part in wanted)) if wanted else None
    found = collect(
        model,
        encoder.loss,
        encoder.batches,
        path,
        kind=configuration.kind,
        base=base,
        fisher=configuration.fisher,
        micro_batch=configuration.micro_batch,
        parameters=chosen,
        layers_at_a_time=configuration.layers_at_a_time,
        dtype=configuration.stored_dtype,
        seed=configuration.seed,
        data=encoder.described(),
        name=configuration.name or configuration.model,
        content=configuration.content,
        checkpoint_every=configuration.checkpoint_every,
        resume=resume,
        progress=progress,
    )
    assert isinstance(found, StatisticsFile)
    return found


def _factors(
    model: nn.Module,
    encoder: Encoder,
    path: str | os.PathLike[str],
    *,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> StatisticsFile:
    """Kronecker factors of the linear layers, from the gradient of each sample's own loss."""
    own = encoder.configuration

    def show(n_done: int, n_planned: int) -> None:
        if progress is not None:
            progress(Progress(0, 1, n_done, n_done * own.batch_size))

    collect_factors(
        model,
        encoder.loss,
        encoder.batches,
        path,
        convention=own.convention,
        form=own.form,
        block=own.block,
        rank=own.rank,
        layers=[f"*{part}*" for part in own.parameters] or None,
        storage=_STORAGE[own.stored_dtype],
        seed=own.seed,
        data=encoder.described(),
        name=own.name or own.model,
        content=own.content,
        checkpoint_every=own.checkpoint_every,
        resume=resume,
        progress=show,
    )
    return open_statistics(path)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Batches of a model from samples, and the loss of each sample."""

    configuration: Configuration
    task: str
    tokenizer: Any
    forward: frozenset[str]  # names of what the model takes
    positions: bool
    padding: int
    mask: int | None
    specials: frozenset[int]
    n_tokens: int

    @staticmethod
    def of(transformers: Any, configuration: Configuration, task: str, model: nn.Module) -> Encoder:
        """For a model and, where the data are texts, its tokenizer."""
        tokenizer = None
        if configuration.data.form != "tokens" or task == "masked_lm":
            tokenizer = _tokenizer(transformers, configuration)
        settings: Any = model.config
        takes = frozenset(inspect.signature(model.forward).parameters)
        padding = next(
            (
                one
                for one in (getattr(tokenizer, "pad_token_id", None), settings.pad_token_id)
                if one is not None
            ),
            0,
        )
        return Encoder(
            configuration,
            task,
            tokenizer,
            takes,
            settings.model_type in _COUNTED_POSITIONS and "position_ids" in takes,
            padding,
            None if tokenizer is None else tokenizer.mask_token_id,
            frozenset(getattr(tokenizer, "all_special_ids", ())),
            int(settings.vocab_size),
        )

    def described(self) -> dict[str, Any]:
        """The data, for the statistics file."""
        data, own = self.configuration.data, self.configuration
        return {
            "path": data.path,
            "sha256": digest_of(data.path),
            "form": data.form,
            "split": data.split,
            "task": self.task,
            "loss": own.loss,
            "max_length": own.max_length,
            "max_samples": own.max_samples,
            "seed": own.seed,
        }

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of the configured size; the last may be smaller.

        Raises:
            CheckpointError: a sample that the model cannot take.
        """
        samples = self._encoded()
        if self.configuration.max_samples:
            samples = islice(samples, self.configuration.max_samples)
        numbered = enumerate(samples)
        while found := list(islice(numbered, self.configuration.batch_size)):
            yield self._batch([self._masked(tokens, label, n) for n, (tokens, label) in found])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood of each sample, [N]; logits where the Fisher's reading asks for them."""
        given = dict(batch)
        labels = given.pop("labels")
        logits = model(**given).logits
        reading = FISHERS[self.configuration.fisher] if self.configuration.kind == "fisher" else None
        if reading is not None and reading.needs_logits:
            return self._checked_logits(logits)
        if self.task == "sequence_classification":
            return functional.cross_entropy(logits, labels, reduction="none")
        if self.task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED
        ).sum(1)
        return (
            losses if self.configuration.loss == "sum" else losses / (labels != IGNORED).sum(1).clamp(min=1)
        )

    # -- samples ----------------------------------------------------------------------------------------

    def _encoded(self) -> Iterator[tuple[list[int], int | list[int] | None]]:
        """(tokens, label) of every sample, cut to `max_length`."""
        most = self.configuration.max_length
        pending: list[int] = []
        for sample in read_samples(self.configuration.data):
            tokens = self._tokens(sample)
            if self.configuration.data.split == "blocks":
                pending += tokens
                while len(pending) >= most:
                    yield pending[:most], None
                    pending = pending[most:]
                continue
            yield tokens[:most], self._label(sample, most)

    def _tokens(self, sample: Sample) -> list[int]:
        if sample.tokens is not None:
            tokens = list(sample.tokens)
        else:
            tokens = list(self.tokenizer(sample.text)["input_ids"])
        if not tokens or max(tokens) >= self.n_tokens:
            found = f"token {max(tokens)}" if tokens else "no token"
            raise CheckpointError(
                f"{sample.place}: has {found}; expected one at least, each below the model's "
                f"{self.n_tokens}. Look at the tokenizer."
            )
        return tokens

    def _label(self, sample: Sample, most: int) -> int | list[int] | None:
        label = sample.label
        if self.task == "sequence_classification":
            if not isinstance(label, int):
                raise CheckpointError(f"{sample.place}: has no label; expected a class, an integer.")
            return label
        return list(label[:most]) if isinstance(label, tuple) else None

    def _masked(
        self, tokens: list[int], label: int | list[int] | None, index: int
    ) -> tuple[list[int], int | list[int]]:
        """Tokens and labels of one sample; what is masked depends on the seed and the sample's index only."""
        if label is not None:
            return tokens, label
        if self.task == "causal_lm":
            return tokens, tokens
        if self.mask is None:
            raise RecipeError(
                f"{self.configuration.where}: the tokenizer has no mask token; expected one for a masked "
                "language model, or tokens with labels."
            )
        drawn = torch.rand(len(tokens), generator=generator_of(self.configuration.seed, index))
        plain = [at for at, token in enumerate(tokens) if token not in self.specials]
        chosen = {at for at in plain if drawn[at] < MASK_SHARE} or set(plain[:1])
        masked = [self.mask if at in chosen else token for at, token in enumerate(tokens)]
        return masked, [token if at in chosen else IGNORED for at, token in enumerate(tokens)]

    def _batch(self, samples: Sequence[tuple[list[int], int | list[int]]]) -> dict[str, Tensor]:
        n_most = max(len(tokens) for tokens, _ in samples)

        def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (n_most - len(row)) for row in rows])

        tokens = [one for one, _ in samples]
        labels = [label for _, label in samples]
        batch = {
            "input_ids": padded(tokens, self.padding),
            "attention_mask": padded([[1] * len(one) for one in tokens], 0),
            "labels": padded([one for one in labels if isinstance(one, list)], IGNORED)
            if self.task != "sequence_classification"
            else torch.tensor(labels),
        }
        if self.positions:
            batch["position_ids"] = torch.arange(n_most).repeat(len(samples), 1)
        return {
            key: value.to(self.configuration.device)
            for key, value in batch.items()
            if key in self.forward or key == "labels"
        }

    def _checked_logits(self, logits: Tensor) -> Tensor:
        if self.configuration.fisher == "matena_raffel" and logits.dim() != 2:
            raise RecipeError(
                f"{self.configuration.where}: fisher: matena_raffel sums over all labels of a sample, and "
                f"a {self.task} has one for every token; expected a sequence_classification model, or mats "
                "or mats_true."
            )
        return logits


# -- transformers -------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "tvfast collect needs transformers, which is not installed; expected it beside tvfast: "
            "pip install 'tvfast[collect]'. Without it, use tvfast.importance.collect."
        ) from None
    return transformers


def _task(transformers: Any, configuration: Configuration) -> str:
    """What the model was made for, from the name of its class."""
    settings = _read(
        lambda: transformers.AutoConfig.from_pretrained(configuration.model, local_files_only=True),
        configuration.model,
    )
    for name in getattr(settings, "architectures", None) or ():
        for suffix, task in _SUFFIXES.items():
            if name.endswith(suffix):
                return task
    raise RecipeError(
        f"{configuration.where}: cannot tell the task of {configuration.model} from its architectures "
        f"{getattr(settings, 'architectures', None)}; expected task: one of {', '.join(_CLASSES)}."
    )


def _loaded(transformers: Any, configuration: Configuration, path: str, task: str) -> nn.Module:
    kind = getattr(transformers, _CLASSES[task])
    dtype = getattr(torch, configuration.dtype)
    found: nn.Module = _read(lambda: kind.from_pretrained(path, dtype=dtype, local_files_only=True), path)
    try:
        return found.to(configuration.device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"{configuration.where}: device {configuration.device!r} cannot be used ({error}); expected cpu, "
            "or a GPU of this machine."
        ) from None


def _tokenizer(transformers: Any, configuration: Configuration) -> Any:
    path = configuration.tokenizer or configuration.model
    return _read(lambda: transformers.AutoTokenizer.from_pretrained(path, local_files_only=True), path)


def _read(read: Callable[[], Any], path: str) -> Any:
    """What transformers reads, its many errors as one.

    Raises:
        CheckpointError: it could not.
    """
    try:
        return read()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path}: transformers cannot read it ({type(error).__name__}: {text}); expected a model "
            "directory on this machine, with config.json and, for texts, a tokenizer."
        ) from None
