"""`tvfast mergekit-yaml`: `tvfast merge` with the command line of mergekit's program of that name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import tvfast
from tvfast.cli.merge import as_text, device
from tvfast.cli.mergekit_flags import WITHOUT_EFFECT, accept, say_what_has_no_effect
from tvfast.cli.progress import TerminalProgress
from tvfast.cli.quantities import seed, whole_number
from tvfast.cli.signals import stoppable
from tvfast.dtypes import BY_RECIPE_NAME
from tvfast.errors import ArgumentError

if TYPE_CHECKING:
    from tvfast.recipe import Recipe

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: Commands) -> None:
    """Register the subcommand."""
    command = commands.add_parser(
        "mergekit-yaml",
        help="merge with mergekit-yaml's command line",
        description=(
            "Merge as `tvfast merge` does, with mergekit-yaml's options. Those that have no meaning here "
            "are accepted, and named once. A model in OUT is replaced when the merge is done."
        ),
        allow_abbrev=False,
    )
    command.add_argument("config_file", metavar="CONFIG", help="recipe, YAML")
    command.add_argument("out_path", metavar="OUT", help="directory of the result")
    switch = argparse.BooleanOptionalAction
    command.add_argument("--cuda", action=switch, default=False, help="merge on a GPU")
    command.add_argument(
        "--device", type=device, metavar="NAME", help="auto, cpu, cuda or for example cuda:1"
    )
    command.add_argument("--gpu-rich", action="store_true", help="the same as --cuda")
    command.add_argument("--multi-gpu", action=switch, default=False, help="the same as --cuda: one GPU")
    command.add_argument("-j", "--num-threads", type=whole_number, default=0, metavar="N", help="threads")
    command.add_argument("--random-seed", type=seed, metavar="N", help="key of random draws")
    command.add_argument(
        "--out-shard-size",
        type=shard_bytes,
        metavar="SIZE",
        help="bytes of an output file: 5B is 5·10⁹, also k, m",
    )
    command.add_argument(
        "--lora-merge-dtype",
        type=storage_type,
        metavar="NAME",
        help="what base + adapter is rounded to before the merge: " + ", ".join(BY_RECIPE_NAME),
    )
    command.add_argument("--copy-tokenizer", action=switch, default=True, help="write tokenizer files")
    command.add_argument(
        "--write-model-card", action=switch, default=True, help="write README.md and mergekit_config.yml"
    )
    command.add_argument("--transformers-cache", metavar="PATH", help="where models of the hub are cached")
    command.add_argument(
        "--safe-serialization", action=switch, default=True, help="always: files are safetensors"
    )
    command.add_argument("--unsafe-truncate-embeddings", action=switch, default=False, help="not supported")
    command.add_argument("--quiet", action=switch, default=False, help="print warnings and errors only")
    command.add_argument("-v", dest="verbosity", action="count", default=0, help="no effect")
    accept(command, WITHOUT_EFFECT)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Merge, and print what was done."""
    _refuse(options)
    say_what_has_no_effect(options, WITHOUT_EFFECT)
    if options.transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = options.transformers_cache
    recipe = tvfast.load_recipe(options.config_file)
    recipe = replace(
        recipe,
        shard_bytes=options.out_shard_size or recipe.shard_bytes,
        copy_tokenizer=options.copy_tokenizer,
        card=options.write_model_card,
    )
    if options.lora_merge_dtype is not None:
        recipe = _with_sums_of(recipe, options.lora_merge_dtype)
    progress = TerminalProgress()
    with stoppable("run the same command again to start anew"):
        try:
            report = tvfast.merge_checkpoints(
                recipe,
                options.out_path,
                device=device_of(options),
                threads=options.num_threads,
                overwrite=True,
                seed=options.random_seed,
                progress=None if options.quiet else progress,
            )
        finally:
            progress.finish()
    for warning in report.warnings:
        print(f"tvfast: warning: {' '.join(warning.split())}", file=sys.stderr)
    if not options.quiet:
        print(as_text(report.as_json()))
    return 0


def device_of(options: argparse.Namespace) -> str:
    """Where mergekit would merge: on the CPU unless it is told otherwise."""
    if options.device is not None:
        return str(options.device)
    return "cuda" if options.cuda or options.gpu_rich or options.multi_gpu else "cpu"


def shard_bytes(text: str) -> int:
    """mergekit's sizes: a number, or one with k, m or b for thousand, million or billion."""
    found = re.fullmatch(r"(\d{1,15})([kmb]?)", text, re.IGNORECASE)
    n_bytes = int(found[1]) * 1000 ** " kmb".index(found[2].lower() or " ") if found else 0
    if n_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or for example 500M or 5B")
    return n_bytes


def storage_type(text: str) -> str:
    """A type by the name that recipes use, with or without `torch.`."""
    name = text.removeprefix("torch.")
    if name not in BY_RECIPE_NAME:
        known = ", ".join(BY_RECIPE_NAME)
        raise argparse.ArgumentTypeError(f"{text!r} is no type of weights; write one of {known}")
    return BY_RECIPE_NAME[name]


def _with_sums_of(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe, and those that it needs, with adapters added in that type."""
    stages = tuple(_with_sums_of(stage, dtype) for stage in recipe.stages)
    return replace(recipe, lora_merge_dtype=dtype, stages=stages)


def _refuse(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: an option that would change the result in a way that is not supported.
    """
    if not options.safe_serialization:
        raise ArgumentError(
            "--no-safe-serialization: output in PyTorch's pickle format is not supported; expected "
            "safetensors, which transformers loads as well. Leave the option out."
        )
    if options.unsafe_truncate_embeddings:
        raise ArgumentError(
            "--unsafe-truncate-embeddings: cutting vocabularies off is not supported; expected a tokenizer "
            "section. Add `tokenizer: {source: base}` to the recipe, which aligns them by token."
        )
