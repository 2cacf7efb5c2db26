"""`tvfast methods`: the registry, as a list or one method in full."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import tvfast

if TYPE_CHECKING:
    from tvfast.methods import MethodInfo

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


_UNREAD = ", whose values are not read"


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "methods",
        help="merge methods, their parameters, formulas and sources",
        description="List the merge methods, or one with its parameters, formula and source.",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="one method in full")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the list, or one method."""
    if options.name is not None:
        info = tvfast.methods.method_info(options.name)
        print(json.dumps(as_json(info), indent=2) if options.json else describe(info))
        return 0
    known = [tvfast.methods.METHODS[name] for name in sorted(tvfast.methods.METHODS)]
    if options.json:
        print(json.dumps({info.name: as_json(info) for info in known}, indent=2))
        return 0
    width = max(len(info.name) for info in known)
    for info in known:
        print(f"{info.name:{width}}  {info.formula}")
    return 0


def as_json(info: MethodInfo) -> dict[str, Any]:
    """A method as plain data."""
    from tvfast.recipe import names_in_recipes

    fewest, most = info.n_models
    names = names_in_recipes(info.name)
    return {
        "name": info.name,
        "formula": info.formula,
        "source": info.source,
        "dialects": list(info.dialects),
        "needs_base": info.needs_base,
        "needs_instruct": info.needs_instruct,
        "n_models": {"min": fewest, "max": most},
        "parameters": [
            {
                "name": one.name,
                "in_recipe": names.get(one.name),
                "default": one.default,
                "meaning": one.meaning,
            }
            for one in info.parameters
        ],
    }


def describe(info: MethodInfo) -> str:
    """A method in full, as text."""
    import inspect

    from tvfast.recipe import names_in_recipes

    fewest, most = info.n_models
    instruct = " and the instruct model" * info.needs_instruct
    count = str(fewest) if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
    width = max(len(one.name) for one in info.parameters)
    names = names_in_recipes(info.name)
    recipe_width = max(map(len, names.values()))
    return "\n".join(
        [
            info.name,
            "",
            *(f"  {line}".rstrip() for line in inspect.cleandoc(info.cls.__doc__ or "").splitlines()),
            "",
            f"source    {info.source}",
            f"dialects  {', '.join(info.dialects)}",
            f"models    {count} besides the base{instruct or ('' if info.needs_base else _UNREAD)}",
            "",
            "parameters, what a recipe calls them, meaning [default]",
            *(
                f"  {one.name:{width}}  {names.get(one.name, '-'):{recipe_width}}  "
                f"{one.meaning} [{one.default}]"
                for one in info.parameters
            ),
        ]
    )
