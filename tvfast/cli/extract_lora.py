"""`tvfast extract-lora`: the difference of two models as a LoRA adapter."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

from tvfast.cli.mergekit_flags import WITHOUT_EFFECT, Flag, accept, say_what_has_no_effect
from tvfast.cli.quantities import bytes_as_text, counted, positive, seed, whole_number
from tvfast.errors import ArgumentError

RANK = 128
DTYPES = ("bfloat16", "float16", "float32")

_CPU = "matrices are decomposed on the CPU"
_WITHOUT_EFFECT = (
    *WITHOUT_EFFECT,
    Flag("--cuda", _CPU),
    Flag("--device", _CPU, "NAME"),
    Flag("--gpu-rich", _CPU),
    Flag("--multi-gpu", _CPU),
    Flag("--lora-merge-dtype", "no adapter is added to a model", "NAME"),
    Flag("--unsafe-truncate-embeddings", "embeddings are saved whole where their rows differ in number"),
    Flag("--copy-tokenizer", "an adapter has no tokenizer"),
    Flag("--safe-serialization", "adapters are safetensors always"),
    Flag("--out-shard-size", "an adapter is one file", "SIZE"),
    Flag("--write-model-card", "the card is always written"),
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand; options have mergekit-extract-lora's names, too."""
    command = commands.add_parser(
        "extract-lora",
        help="the difference of two models as a LoRA adapter",
        description="Approximate the difference of a model and its base by matrices of low rank, and write "
        "them as an adapter that peft loads. Embeddings, head and norms are saved whole where they differ.",
    )
    command.add_argument("positional", nargs="?", metavar="MODEL", help="the fine-tuned checkpoint")
    command.add_argument("--model", metavar="MODEL", help="the same")
    command.add_argument(
        "--base", "--base-model", required=True, metavar="BASE", dest="base", help="what it was tuned from"
    )
    command.add_argument(
        "--out", "--out-path", required=True, metavar="DIR", dest="out", help="the adapter's directory"
    )
    command.add_argument(
        "--rank",
        "--max-rank",
        type=_rank,
        default=RANK,
        metavar="R",
        dest="rank",
        help="of each module, at most (%(default)s)",
    )
    command.add_argument(
        "--save-module", action="append", default=[], metavar="NAME", help="a module to save whole"
    )
    command.add_argument(
        "-e", "--exclude-regex", action="append", default=[], metavar="REGEX", help="modules to leave out"
    )
    command.add_argument(
        "-i", "--include-regex", action="append", default=[], metavar="REGEX", help="modules to take, alone"
    )
    command.add_argument(
        "--embed-lora",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="approximate embeddings and head, too",
    )
    command.add_argument(
        "--distribute-scale",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share singular values between both factors",
    )
    command.add_argument(
        "--sv-epsilon", type=_epsilon, default=0.0, metavar="X", help="drop singular values up to this"
    )
    command.add_argument(
        "--skip-undecomposable", action="store_true", help="leave out what is no matrix, such as norms"
    )
    command.add_argument(
        "--tolerance",
        type=positive,
        default=2e-3,
        metavar="X",
        help="relative excess over the least error of that rank (%(default)s)",
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the factors (the base's)")
    command.add_argument(
        "--seed",
        "--random-seed",
        type=seed,
        default=0,
        metavar="N",
        dest="seed",
        help="of random projections",
    )
    command.add_argument(
        "--threads",
        "-j",
        "--num-threads",
        type=whole_number,
        default=0,
        metavar="N",
        dest="threads",
        help="0: all cores",
    )
    command.add_argument("--transformers-cache", metavar="PATH", help="where models of the hub are cached")
    command.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    command.add_argument("-v", dest="verbosity", action="count", default=0, help="no effect")
    command.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    accept(command, _WITHOUT_EFFECT)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Extract, and print what was."""
    from tvfast import extract_lora

    say_what_has_no_effect(options, _WITHOUT_EFFECT)
    if options.transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = options.transformers_cache
    given = [path for path in (options.positional, options.model) if path is not None]
    if len(given) != 1:
        raise ArgumentError(f"extract-lora got {len(given)} models; expected one, as MODEL or --model MODEL.")
    found = extract_lora(
        given[0],
        options.base,
        options.out,
        rank=options.rank,
        save_modules=options.save_module,
        include=options.include_regex,
        exclude=options.exclude_regex,
        embed_lora=options.embed_lora,
        distribute_scale=options.distribute_scale,
        sv_epsilon=options.sv_epsilon,
        skip_undecomposable=options.skip_undecomposable,
        tolerance=options.tolerance,
        seed=options.seed,
        threads=options.threads,
        dtype=options.dtype,
        overwrite=options.overwrite,
        progress=_show if sys.stderr.isatty() and not options.quiet else None,
    )
    for warning in found.warnings:
        print(f"tvfast: warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
        return 0
    if options.quiet:
        return 0
    rank = max(found.ranks.values(), default=0)
    worst = max(found.errors, key=lambda module: found.errors[module], default="")
    print(
        f"{found.out}: {counted(len(found.ranks), 'module')} of rank {rank}, "
        f"{counted(len(found.saved), 'tensor')} whole, {bytes_as_text(found.n_bytes)}"
    )
    if worst:
        print(f"largest relative error {found.errors[worst]:.4f}, of {worst}")
    return 0


def _rank(text: str) -> int:
    rank = whole_number(text)
    if rank < 1:
        raise argparse.ArgumentTypeError(f"{text} is no rank; expected at least 1")
    return rank


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    sys.stderr.write(f"\r{done / max(total, 1):.0%} of {total:,} parameters{end}")
    sys.stderr.flush()
