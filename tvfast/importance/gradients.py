"""Gradients of single samples from one batched pass, from captured activations and output gradients.

A backward pass of Σ_n loss_n hands every module the gradients e_n at its output. With the inputs a_n that
were captured on the way forward, a linear layer's gradient of sample n is the product e_nᵀ a_n of rank R, its
number of tokens; an embedding's has the e_n of its tokens as rows. They are handed over in that form. Other
gradients are formed in one buffer of the parameter's size, handed over and overwritten by the next sample's,
so memory does not depend on the number of samples. The weights require no gradient meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Taker(Protocol):
    """What becomes of gradients. The samples of a call come in order; each number says how many a gradient
    is of, where samples are added before anything else is done."""

    def gradient(self, name: str, gradient: Tensor, n: int) -> None:
        """A gradient of the parameter's shape, float32 or float64; it is overwritten afterwards."""

    def layer(self, name: str, e: Sequence[Tensor], a: Sequence[Tensor], ns: Sequence[int]) -> None:
        """Gradients Σ_r e_r a_rᵀ of a linear layer's weight: e [R, o] and a [R, i] of each."""

    def embedding(self, name: str, e: Sequence[Tensor], tokens: Sequence[Tensor], ns: Sequence[int]) -> None:
        """Gradients of an embedding: e [R, o] and the rows that they belong to, [R], of each."""


@dataclass(slots=True)
class Call:
    """One forward call of a module that owns parameters."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]

    def check(self) -> None:
        """Raise if an input was overwritten after the call: no gradient can be formed from it."""
        if tuple(one._version for one in _tensors(self.args)) != self.versions:
            raise _Unserved(f"the input of {type(self.module).__name__} was overwritten in place")


@dataclass(slots=True)
class _Use:
    """A parameter, its names inside the modules that own it, and what has arrived for it."""

    name: str
    parameter: nn.Parameter
    n_calls: int = 0
    arrived: list[tuple[Call, str, Tensor]] = field(default_factory=list)


class SampleGradients:
    """Hands the gradients of samples to `taker`, for chosen parameters of a model.

    Args:
        model: in evaluation mode, with parameters that require no gradient.
        parameters: by name.
        taker: is given those of every parameter, `chunk` samples at a time.
        chunk: samples whose gradients are summed; 0: all of a batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], taker: Taker, chunk: int
    ) -> None:
        self._model = model
        self._uses = {id(p): _Use(name, p) for name, p in parameters.items()}
        self._taker = taker
        self._chunk = chunk
        self._n_samples = 0
        self._capturing = False
        self.unserved: dict[str, str] = {}  # parameters that could not be served, and why

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Within it, forward passes are captured; at its end everything captured is let go."""
        handles = []
        for module in self._model.modules():
            owned = {n: p for n, p in module._parameters.items() if p is not None and id(p) in self._uses}
            if owned:
                handles.append(module.register_forward_hook(self._hook(owned), with_kwargs=True))
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
            for handle in handles:
                handle.remove()
            for use in self._uses.values():
                use.n_calls = 0
                use.arrived.clear()

    def backward(self, objective: Tensor, *, last: bool) -> None:
        """Hand over the gradients of one objective.

        Args:
            objective: [N], one number per sample, of the captured forward pass.
            last: no further objective of this pass follows.
        """
        self._n_samples = objective.numel()
        if objective.requires_grad:
            objective.sum().backward(retain_graph=not last)  # type: ignore[no-untyped-call]
        for use in self._uses.values():  # calls that the objective does not depend on bring nothing
            if use.arrived:
                self._hand_over(use)

    # -- hooks ------------------------------------------------------------------------------------------

    def _hook(self, owned: Mapping[str, nn.Parameter]) -> Callable[..., Any]:
        def captured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._capturing:
                return None
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None  # its parameters get no gradient here, which the first batch's check finds
            call = Call(module, args, kwargs, tuple(one._version for one in _tensors(args)))
            for parameter in owned.values():
                self._uses[id(parameter)].n_calls += 1
            leaf = not output.requires_grad
            if leaf:
                output = output.detach().requires_grad_()
            # Work in place on a view, as a linear layer's output of three dimensions is, gives the view a new
            # history, past its hooks; its base keeps them.
            whole = output._base
            target = output if whole is None or whole.shape.numel() != output.shape.numel() else whole
            shape = output.shape
            target.register_hook(lambda gradient: self._arrived(call, owned, gradient.reshape(shape)))
            return output.clone() if leaf else None  # what follows may work in place, which a leaf forbids

        return captured

    def _arrived(self, call: Call, owned: Mapping[str, nn.Parameter], gradient: Tensor) -> None:
        for local, parameter in owned.items():
            use = self._uses[id(parameter)]
            use.arrived.append((call, local, gradient.detach()))
            if len(use.arrived) == use.n_calls:
                self._hand_over(use)

    def _hand_over(self, use: _Use) -> None:
        capturing, self._capturing = self._capturing, False  # modules may run again
        try:
            for call, _, _ in use.arrived:
                call.check()
            if not self._in_factors(use):
                self._formed(use)
        except _Unserved as error:
            self.unserved[use.name] = str(error)
        finally:
            self._capturing = capturing
            use.arrived.clear()

    def _parts(self) -> list[slice]:
        """The samples whose gradients are added, in order."""
        n, chunk = self._n_samples, self._chunk or self._n_samples
        return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]

    def _in_factors(self, use: _Use) -> bool:
        """Hand over a weight's gradients as factors; False where more than one call of a layer makes them."""
        if len(use.arrived) != 1 or use.parameter.dtype == torch.float64:
            return False
        call, local, e = use.arrived[0]
        if local != "weight" or not _is_plain_call(call) or not isinstance(call.args[0], Tensor):
            return False
        module, x, n = call.module, call.args[0].detach(), self._n_samples
        if x.dtype == torch.float64 or e.dtype == torch.float64:
            return False
        rows = x.shape if _is_plain_embedding(module) else x.shape[:-1]
        if e.shape[:-1] != rows or (n != 1 and (not rows or rows[0] != n)):
            return False
        parts = [slice(None)] if n == 1 else self._parts()
        counts = [n] if n == 1 else [part.stop - part.start for part in parts]
        es = [e[part].reshape(-1, e.shape[-1]).contiguous() for part in parts]
        if type(module) is nn.Linear:
            inputs = [x[part].reshape(-1, x.shape[-1]).contiguous() for part in parts]
            self._taker.layer(use.name, es, inputs, counts)
        elif _is_plain_embedding(module):
            tokens = [x[part].reshape(-1).long().contiguous() for part in parts]
            if module.padding_idx is not None:
                kept = [one != module.padding_idx for one in tokens]
                es = [one[those] for one, those in zip(es, kept, strict=True)]
                tokens = [one[those] for one, those in zip(tokens, kept, strict=True)]
            self._taker.embedding(use.name, es, tokens, counts)
        else:
            return False
        return True

    def _formed(self, use: _Use) -> None:
        """Hand over gradients that are formed from all calls that use a parameter."""
        n = self._n_samples
        wide = torch.float64 if use.parameter.dtype == torch.float64 else torch.float32
        buffer = torch.empty(use.parameter.shape, dtype=wide, device=use.parameter.device)
        for part in self._parts():
            buffer.zero_()
            whole = n == 1 or part.stop - part.start == n
            for call, local, gradient in use.arrived:
                _add(buffer, call, local, gradient, None if whole else part, n)
            self._taker.gradient(use.name, buffer, part.stop - part.start)


def _add(
    buffer: Tensor, call: Call, local: str, gradient: Tensor, part: slice | None, n_samples: int
) -> None:
    """Add the gradient of the samples of `part` (None: all) that one call contributes."""
    module = call.module
    if part is not None and gradient.shape[0] != n_samples:
        raise _Unserved(f"{type(module).__name__} has outputs of shape {list(gradient.shape)}")
    e = gradient if part is None else gradient[part]
    if type(module) is nn.Linear and _is_plain_call(call):
        rows = e.reshape(-1, e.shape[-1]).to(buffer.dtype)
        if local == "bias":
            buffer += rows.sum(0)
            return
        a = _part(call.args[0], part, n_samples)
        buffer.addmm_(rows.t(), a.reshape(-1, a.shape[-1]).to(buffer.dtype))
    elif _is_plain_embedding(module) and _is_plain_call(call):
        indices = _part(call.args[0], part, n_samples).reshape(-1)
        rows = e.reshape(-1, e.shape[-1]).to(buffer.dtype)
        if module.padding_idx is not None:
            rows = rows.masked_fill((indices == module.padding_idx).unsqueeze(1), 0.0)
        buffer.index_add_(0, indices, rows)
    else:
        buffer += _by_running_again(call, local, e, part, n_samples).to(buffer.dtype)


def _by_running_again(call: Call, local: str, e: Tensor, part: slice | None, n_samples: int) -> Tensor:
    """The gradient of any other module: its own, run alone on the samples of the part."""
    parameter = call.module._parameters[local]
    assert parameter is not None
    with torch.enable_grad():
        own = parameter.detach().requires_grad_()
        args = _part(call.args, part, n_samples)
        kwargs = _part(call.kwargs, part, n_samples)
        # Not tied: modules inside that hold the same parameter have calls of their own.
        output = functional_call(call.module, {local: own}, args, kwargs, tie_weights=False)
        found = None
        if output.requires_grad:
            (found,) = torch.autograd.grad(output, own, e, allow_unused=True)
    return torch.zeros_like(parameter) if found is None else found


class _Unserved(Exception):
    """A parameter whose gradients of single samples cannot be formed."""


def _is_plain_call(call: Call) -> bool:
    return len(call.args) == 1 and not call.kwargs


def _is_plain_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq


def sample_of(batch: Any, n: int, n_samples: int) -> Any:
    """A batch of sample n alone: every tensor of n_samples rows is cut, everything else is passed on."""
    return _part(batch, slice(n, n + 1), n_samples)


def _part(value: Any, part: slice | None, n_samples: int) -> Any:
    if isinstance(value, Tensor):
        found = value.detach()
        return found if part is None or not found.dim() or found.shape[0] != n_samples else found[part]
    if isinstance(value, Mapping):
        return {key: _part(item, part, n_samples) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_part(item, part, n_samples) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_part(item, part, n_samples) for item in value)
    return value


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
