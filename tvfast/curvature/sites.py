"""Which modules of a model have factors, and under whose name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.errors import ArgumentError
from tvfast.statistics.tensors import parameter_names

LINEAR, NORM, EMBEDDING = "linear", "norm", "embedding"
KINDS = (LINEAR, NORM, EMBEDDING)


@dataclass(frozen=True, eq=False)
class Site:
    """A module whose statistics are collected.

    Attributes:
        kind: one of `KINDS`.
        weight, bias: names of the parameters; bias None: there is none.
        shape: of the weight.
        n_in, n_out: i and o: the module maps [..., i] to [..., o].
        transposed: the weight is [i, o], as in an embedding or in GPT-2.
    """

    module: nn.Module
    kind: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    n_in: int
    n_out: int
    transposed: bool


def find_sites(
    model: nn.Module, kinds: Sequence[str], layers: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[Site], list[str]]:
    """The sites of a model in the order of its modules, and what is left out, with the reason.

    Args:
        kinds: of modules.
        layers: patterns of weight names, as for file names; None: all but the output head of a model that
            names it (`get_output_embeddings`).
        exclude: patterns of weight names.

    Raises:
        ArgumentError: a pattern that fits nothing, or no site at all.
    """
    names = {id(parameter): name for name, parameter in parameter_names(model).items()}
    head = _head(model) if layers is None else None
    sites: list[Site] = []
    left_out: list[str] = []
    taken: set[str] = set()
    for module in model.modules():
        site = _site(module, names)
        if site is None or site.kind not in kinds:
            continue
        if layers is not None and not _fits(site.weight, layers):
            continue
        if _fits(site.weight, exclude):
            continue
        if module is head:
            left_out.append(f"{site.weight}: the output head; name it in layers to collect it")
        elif site.weight in taken:
            left_out.append(f"{site.weight}: tied, its first use is collected")
        else:
            taken.add(site.weight)
            sites.append(site)
    for pattern in layers or ():
        if not any(fnmatchcase(site.weight, pattern) for site in sites):
            raise ArgumentError(
                f"layers has {pattern!r}, which fits no weight of a {' or '.join(kinds)} module; "
                f"expected patterns such as {next(iter(names.values()), 'weight')!r}."
            )
    if not sites:
        raise ArgumentError(
            f"{type(model).__name__} has no {' or '.join(kinds)} module that is not excluded."
        )
    return sites, left_out


def _site(module: nn.Module, names: dict[int, str]) -> Site | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or id(weight) not in names:
        return None
    bias = getattr(module, "bias", None)
    bias_name = names.get(id(bias)) if isinstance(bias, nn.Parameter) else None
    name, shape = names[id(weight)], tuple(weight.shape)
    if isinstance(module, nn.Linear):
        return Site(module, LINEAR, name, bias_name, shape, shape[1], shape[0], False)
    if type(module).__name__ == "Conv1D" and weight.dim() == 2:  # of transformers: y = x W + b
        return Site(module, LINEAR, name, bias_name, shape, shape[0], shape[1], True)
    if isinstance(module, nn.Embedding):
        return Site(module, EMBEDDING, name, None, shape, shape[0], shape[1], True)
    if (weight.dim() == 1 and isinstance(module, nn.LayerNorm)) or _is_rms_norm(module, weight):
        return Site(module, NORM, name, bias_name, shape, shape[0], shape[0], False)
    return None


def _is_rms_norm(module: nn.Module, weight: Tensor) -> bool:
    return weight.dim() == 1 and type(module).__name__.endswith("RMSNorm")


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm as it is before it is multiplied by the weight, in float32 or wider."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, nn.LayerNorm):
        return torch.nn.functional.layer_norm(wide, module.normalized_shape, eps=module.eps)
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(x.dtype).eps  # as torch.nn.RMSNorm
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
