"""Replacing a peer's functions, and giving them back."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any

import torch

from tvfast.errors import PeerError, UnknownNameError

Function = Callable[..., Any]

GENERATORS = ("tvfast", "peer")


class NotServed(Exception):
    """This call is left to the peer's own code; raised before anything is written that was there."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One function of a peer that is replaced.

    Attributes:
        name: its key in `stats()`.
        module: the module that defines it.
        attribute: where it is in that module; dots lead into classes and objects.
        make: from the peer's own function to ours, which has the same parameters.
        within: from the module to what `attribute` is looked up in, where no name leads there.
    """

    name: str
    module: str
    attribute: str
    make: Callable[[Function], Function]
    within: Callable[[ModuleType], Any] | None = None


@dataclass(slots=True)
class _Patch:
    """A replacement that is in force; `owner` is a class or an object, None for a function of a module."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any


_State = tuple[str, dict[str, Any]]
"""Generator and options of an integration that is in force."""


@dataclass(slots=True)
class Integration:
    """One peer: its hooks, whether they are in force, and what they did.

    `install`, `uninstall`, `stats` and `fallbacks` are also functions of the peer's module, and the module is
    a context manager that installs and uninstalls.
    """

    distribution: str
    package: str
    versions: tuple[str, ...]
    hooks: Callable[[str], Sequence[Hook]]
    rng: str = "tvfast"
    options: dict[str, Any] = field(default_factory=dict)
    _patches: list[_Patch] = field(default_factory=list)
    _served: Counter[str] = field(default_factory=Counter)
    _left: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _patching: threading.RLock = field(default_factory=threading.RLock)
    _before: _State | None = None
    _outer: list[_State | None] = field(default_factory=list)

    def install(self, *, rng: str = "tvfast") -> Integration:
        """Replace the peer's functions, in every module of it that has bound them; the counts start at 0.

        The peer may have been imported or not: it is imported here. Installing again changes the options.

        Args:
            rng: where random methods draw from: "tvfast", keyed by a number that is drawn from torch's
                generator, so that `torch.manual_seed` decides; or "peer", the peer's own draws in its order.

        Returns:
            A context manager, whose end brings back what was before: the peer's functions, or the options of
            an installation around it.

        Raises:
            PeerError: the peer is not installed, or of a version that is not known.
            UnknownNameError: `rng`.
        """
        if rng not in GENERATORS:
            raise UnknownNameError(f"rng {rng!r} does not exist; expected one of {', '.join(GENERATORS)}.")
        with self._patching:
            before = self._state()
            if before is None:
                self._replace(self._version())
            self._before, self.rng = before, rng
        return self

    def _state(self) -> _State | None:
        return (self.rng, dict(self.options)) if self._patches else None

    def _replace(self, found: str) -> None:
        self._served.clear()
        self._left.clear()
        try:
            for hook in self.hooks(found):
                self._patch(hook)
        except (ImportError, AttributeError) as error:
            self.uninstall()
            raise PeerError(
                f"{self.distribution} {found} cannot be accelerated: {error}. Expected an intact "
                f"installation of {self._known()}."
            ) from error

    def uninstall(self) -> None:
        """Give the peer its own functions back; counts stay. Nothing happens if none are replaced."""
        with self._patching:
            self.options.clear()
            self._outer.clear()
            while self._patches:
                patch = self._patches.pop()
                if patch.owner is None:
                    _rebind(self.package, patch.replacement, patch.original)
                else:
                    setattr(patch.owner, patch.attribute, patch.original)

    def stats(self) -> dict[str, int]:
        """Calls that went through tvfast since `install()`, by hook."""
        with self._lock:
            return dict(self._served)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Calls that were left to the peer since `install()`, by hook and reason."""
        found: dict[str, dict[str, int]] = {}
        with self._lock:
            for (name, reason), count in self._left.items():
                found.setdefault(name, {})[reason] = count
        return found

    @property
    def installed(self) -> bool:
        """Whether the peer's functions are replaced now."""
        return bool(self._patches)

    def __enter__(self) -> Integration:
        with self._patching:
            if not self.installed:
                self.install()
            self._outer.append(self._before)
            self._before = self._state()  # of a block inside that does not install
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._patching:
            before = self._outer.pop() if self._outer else None
            if before is None or not self.installed:
                self.uninstall()
            else:
                self.rng, options = before
                self.options.clear()
                self.options.update(options)
                self._before = before

    def _version(self) -> str:
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            raise PeerError(
                f"{self.distribution} is not installed; expected {self._known()}. "
                f"Run: pip install {self.distribution}=={self.versions[-1]}"
            ) from None
        if found not in self.versions:
            raise PeerError(
                f"{self.distribution} {found} is installed; expected {self._known()}, whose results the "
                "integration reproduces. Install one of them, or work without the integration."
            )
        return found

    def _known(self) -> str:
        return f"version {' or '.join(self.versions)}"

    def _patch(self, hook: Hook) -> None:
        module = importlib.import_module(hook.module)
        *path, attribute = hook.attribute.split(".")
        owner = functools.reduce(getattr, path, hook.within(module) if hook.within else module)
        original = vars(owner)[attribute] if attribute in vars(owner) else getattr(owner, attribute)
        replacement = self._counted(hook.name, original, hook.make(original))
        if owner is module:
            _rebind(self.package, original, replacement)
            self._patches.append(_Patch(None, attribute, original, replacement))
        else:
            setattr(owner, attribute, replacement)
            self._patches.append(_Patch(owner, attribute, original, replacement))

    def _counted(self, name: str, original: Function, ours: Function) -> Function:
        """Ours where it serves the call, otherwise the peer's; both are counted."""

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._patches:  # someone kept the function beyond `uninstall`
                return original(*args, **kwargs)
            drawn = torch.get_rng_state()
            try:
                result = ours(*args, **kwargs)
            except NotServed as left:
                reason = str(left)
                torch.set_rng_state(drawn)  # the peer draws what it would have drawn without us
            else:
                with self._lock:
                    self._served[name] += 1
                return result
            with self._lock:
                self._left[name, reason] += 1
            return original(*args, **kwargs)

        return call


class IntegrationModule(ModuleType):
    """A module that is a context manager: `with tvfast.integrations.peft: ...`."""

    INTEGRATION: Integration

    def __enter__(self) -> Integration:
        return self.INTEGRATION.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.INTEGRATION.__exit__(kind, error, traceback)


def same(function: Function) -> Callable[[Function], Function]:
    """`Hook.make` of a function that does not call the peer's own."""
    return lambda original: function


def _rebind(package: str, old: Any, new: Any) -> None:
    """Every name in the peer's modules that is bound to `old` is bound to `new`."""
    for module in _modules(package):
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _modules(package: str) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == package or name.startswith(package + ".")):
            yield module
