"""Triton's interpreter without work that it repeats, which is half of its time.

At a launch it replaces the functions of `triton.language` by its own, and in the end puts them back. It
replaces them once more at every call of a function inside the kernel, where they are replaced already. And
it writes down the table of types anew wherever it looks up one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def repeat_nothing() -> None:
    """For this process; what this Triton does otherwise stays as it is."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _replacing_once(interpreter._patch_lang, interpreter._LangPatchScope)


def _looked_up_once(look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from triton.language.core import dtype

    of_scalar = cache(look_up)
    return lambda one: of_scalar(one.scalar) if type(one.scalar) is dtype else look_up(one)


def _replacing_once(replace: Callable[[Any], Any], scope_class: Any) -> Callable[[Any], Any]:
    from triton import language

    launched: list[set[str]] = []  # the modules that the running launch has dealt with

    @cache
    def modules_of(function: Any) -> set[str]:
        values = [id(value) for value in function.__globals__.values()]
        return {module.__name__ for module in (language, language.core) if id(module) in values}

    def restore(scope: Any) -> None:
        launched.clear()
        scope_class.restore(scope)

    def replace_once(function: Any) -> Any:
        modules = modules_of(function)
        if launched and modules <= launched[0]:
            return scope_class()
        scope = replace(function)
        if launched:
            launched[0] |= modules
        else:
            launched.append(set(modules))
            scope.restore = lambda: restore(scope)
        return scope

    return replace_once
