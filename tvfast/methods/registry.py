"""Methods by name, each in a module that is imported when one of its methods is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvfast.methods.base import Method


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword of a method: its name, default and meaning; `words` are all it can be, if it is a word."""

    name: str
    default: Any
    meaning: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What the registry knows of a method. `n_models`: fewest and most (None: no limit), base not counted.

    `needs_scores`: every model must bring scores, from a statistics file. `optional_base`: a recipe may leave
    the base out; the models themselves are then merged. `needs_instruct`: the instruct model of the base is
    the last operand, beside the models.
    """

    name: str
    cls: type[Method]
    source: str
    dialects: tuple[str, ...]
    needs_base: bool
    n_models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    needs_scores: bool = False
    optional_base: bool = False
    needs_instruct: bool = False

    @property
    def formula(self) -> str:
        """The first line of the class docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]


class Registry(MutableMapping[str, MethodInfo]):
    """Methods by name.

    Args:
        modules: below `tvfast.methods`, with the methods that each registers when it is imported.
    """

    def __init__(self, modules: Mapping[str, tuple[str, ...]]) -> None:
        self._modules = {name: module for module, names in modules.items() for name in names}
        self._known: dict[str, MethodInfo] = {}

    def __getitem__(self, name: str) -> MethodInfo:
        if name not in self._known and name in self._modules:
            import_module(f"tvfast.methods.{self._modules[name]}")
        return self._known[name]

    def __setitem__(self, name: str, info: MethodInfo) -> None:
        self._known[name] = info

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._known.pop(name, None)
        self._modules.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._known})

    def __len__(self) -> int:
        return len({**self._modules, **self._known})


METHODS = Registry(
    {
        "breadcrumbs": ("breadcrumbs", "breadcrumbs_ties"),
        "dare": ("dare_linear", "dare_ties"),
        "della": ("della", "della_linear"),
        "fisher": ("fisher",),
        "geometric_median": ("geometric_median",),
        "kronecker": ("kfac", "mats", "regmean"),
        "lata": ("lata",),
        "linear": ("linear",),
        "magnitude": ("magmax", "magnitude_prune"),
        "model_stock": ("model_stock",),
        "nearswap": ("nearswap",),
        "passthrough": ("passthrough",),
        "ram": ("ram", "ramplus_tl"),
        "sce": ("sce",),
        "slerp": ("slerp",),
        "spherical": ("karcher", "multislerp", "nuslerp"),
        "sta": ("sta", "sta_forget"),
        "task_arithmetic": ("task_arithmetic",),
        "ties": ("ties",),
        "whole.consensus": ("consensus", "pcb"),
        "whole.fusion": ("arcee_fusion",),
        "whole.spectral": ("iso_c", "iso_cts", "knots", "tsv_m", "wudi"),
    }
)
"""Every method by name."""
