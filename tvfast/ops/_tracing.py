"""Where calls go that are traced rather than run: to the custom operators of `tvfast.ops.library`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def traceable(function: Function) -> Function:
    """The function; under `torch.compile` and on fake tensors its namesake of `tvfast.ops.library`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _any_fake((*args, *kwargs.values())):
            from tvfast.ops import library

            return getattr(library, function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def _any_fake(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        tensors = argument if isinstance(argument, list | tuple) else (argument,)
        # a plain tensor and a parameter, which most are, need no look at the modules of fake tensors
        if any(isinstance(one, Tensor) and type(one) is not Tensor and _is_fake(one) for one in tensors):
            return True
    return False


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
