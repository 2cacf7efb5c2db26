"""Compile the kernels for GPUs that are not here: registers, spills, and what the code must not hold.

`python -m tvfast.kernels.compile_ahead` prints a line per kernel and architecture, and fails if one spills
registers, flushes subnormals, approximates a division, or contracts a product and a sum that no stage fuses.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from tvfast.kernels import launch, layers, measure, score, selection
from tvfast.kernels.combine import combine_kernel
from tvfast.kernels.kron import finish_kernel, kron_kernel
from tvfast.kernels.lanes import MIXED
from tvfast.kernels.ranks import LONGEST_ROW, ranks_kernel
from tvfast.kernels.select import (
    DIGITS,
    count_equal_kernel,
    find_equal_kernel,
    histogram_kernel,
    pick_kernel,
)
from tvfast.kernels.table import Kind

from tvfast.program import (
    Ballot,
    Cross,
    Divisor,
    DType,
    Gain,
    Keep,
    Members,
    Program,
    Reduce,
    Tie,
    Vote,
    Weighting,
    ZeroSign,
)

ARCHITECTURES = (80, 90)

_FIELDS = {
    "keep": Keep,
    "tie": Tie,
    "cross": Cross,
    "gain": Gain,
    "weighting": (Weighting.MODEL, Weighting.SCORE, Weighting.ALONE),
    "vote": Vote,
    "ballot": Ballot,
    "zero_sign": ZeroSign,
    "members": Members,
    "reduce": Reduce,
    "divisor": Divisor,
}
_TIES = Program(keep=Keep.BAND, tie=Tie.HASH, vote=Vote.MASS, members=Members.STRICT, divisor=Divisor.COUNT)
_USUAL = Kind(dtype=int(DType.BF16), out_dtype=int(DType.BF16), has_base=True, aligned=True)
_INTEGERS = (
    *("stride", "n_entries", "n_models", "width", "k"),
    *("n_samples", "n_out", "n_in", "n_a", "a_block", "b_block", "n_rows", "n_columns"),
    *("x_stride", "product_stride", "out_stride"),
)
_ADDRESSES = ("model_address", "base_address", "out_address", "x_address", "product_address")
_REALS = ("tensors", "all_reals", "weights")
_USAGE = re.compile(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")  # of cuobjdump


def covering_programs() -> list[Program]:
    """Programs in which every two values of different stages meet at least once, found greedily."""
    names = list(_FIELDS)
    pairs = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in _FIELDS[a] for y in _FIELDS[b]
    }
    found = []
    while pairs:
        (first, x), (second, y) = min(pairs, key=str)
        chosen: dict[str, Any] = {first: x, second: y}
        for name in names:
            if name not in chosen:
                chosen[name] = max(_FIELDS[name], key=lambda value: _n_met(pairs, chosen, name, value))
        met = set(itertools.combinations([(name, chosen[name]) for name in names], 2))
        pairs -= met
        found.append(Program(**chosen))
    return found


def _n_met(pairs: set[Any], chosen: dict[str, Any], name: str, value: Any) -> int:
    here = (name, value)
    return sum(
        (((other, taken), here) in pairs) + ((here, (other, taken)) in pairs)
        for other, taken in chosen.items()
    )


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One kernel with its compile-time arguments."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    fuses: bool = False  # products and sums are meant to be contracted
    options: dict[str, Any] = field(default_factory=lambda: launch.EXACT)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled specialisation needs, and what is wrong with its code."""

    registers: int
    n_spills: int  # instructions that store to or load from a thread's own memory
    shared_bytes: int
    ptx: str
    faults: tuple[str, ...]


def specialisations() -> Iterator[Specialisation]:
    """Every kernel: all pairs of stages, every count of models, every kind of entry, all that is measured."""
    for number, program in enumerate(covering_programs()):
        yield _combine(f"pairs {number}", program, _USUAL, 3)
    for n_models in (1, 2, 4, 8, 9):
        yield _combine(f"ties, {n_models} models", _TIES, _USUAL, n_models)
    for dtype in (DType.F32, DType.F16):
        yield _combine(f"ties, {dtype.name}", _TIES, Kind(int(dtype), int(dtype), True, True), 3)
    yield _combine("ties, unaligned", _TIES, Kind(int(DType.BF16), int(DType.BF16), True, False), 3)
    yield _combine("ties, mixed", _TIES, Kind(-1, int(DType.F32), True, True), 3)
    yield _combine("linear, no base", Program(), Kind(int(DType.BF16), int(DType.BF16), False, True), 3)
    yield _combine("nearness", Program(weighting=Weighting.NEARNESS), _USUAL, 2)
    yield _combine("alone, 9 models", Program(weighting=Weighting.ALONE), _USUAL, 9)
    given = replace(_USUAL, task_vectors=True)
    yield _combine("task vectors, summed", Program(), given, 8)
    yield _combine("task vectors, ties", _TIES, given, 3)
    everything = 2 * measure.ALONE.value - 1
    for keep in Keep:
        program = Program(keep=keep, tie=Tie.HASH, vote=Vote.MASS)
        constants = launch.measure_constants(program, _USUAL, 3, everything)
        yield Specialisation(f"measure {keep.name}", measure.measure_kernel, constants)
        constants = {**launch.keep_constants(program, _USUAL), "BLOCK": launch.block_of(3)}
        yield Specialisation(f"planes {keep.name}", measure.planes_kernel, constants)
    for keep in (Keep.BAND, Keep.SCORE, Keep.VARIANCE):
        constants = selection.key_constants(keep, _USUAL)
        for shift, bits in DIGITS:
            own = {**constants, "SHIFT": shift, "BITS": bits}
            yield Specialisation(f"histogram {keep.name} {shift}", histogram_kernel, own)
        yield Specialisation(f"count equal {keep.name}", count_equal_kernel, constants)
        yield Specialisation(f"find equal {keep.name}", find_equal_kernel, constants)
    for bits in sorted({bits for _, bits in DIGITS}):
        yield Specialisation(f"pick {bits}", pick_kernel, {"BITS": bits})
    width = 64
    while width <= LONGEST_ROW:
        constants = {"DTYPE": int(DType.BF16), "HAS_BASE": True, "ALIGNED": True, "BLOCK": width}
        yield Specialisation(f"ranks {width}", ranks_kernel, constants)
        width *= 2
    yield from _layer_specialisations()
    yield from _of_ones()


def _of_ones() -> Iterator[Specialisation]:
    """Kernels whose sizes and counts are 1: the compiler makes constants of such arguments."""
    one = [_combine("ties", _TIES, _USUAL, 1), _combine("variance", Program(keep=Keep.VARIANCE), _USUAL, 1)]
    everything = 2 * measure.ALONE.value - 1
    own = launch.measure_constants(replace(_TIES, weighting=Weighting.ALONE), _USUAL, 1, everything)
    one.append(Specialisation("measure", measure.measure_kernel, own))
    own = {**launch.keep_constants(_TIES, _USUAL), "BLOCK": launch.block_of(1)}
    one.append(Specialisation("planes", measure.planes_kernel, own))
    own = selection.key_constants(Keep.BAND, _USUAL)
    one.append(Specialisation("histogram", histogram_kernel, {**own, "SHIFT": 20, "BITS": 11}))
    one += [Specialisation("count equal", count_equal_kernel, own)]
    one += [Specialisation("find equal", find_equal_kernel, own)]
    own = {"DTYPE": int(DType.BF16), "HAS_BASE": True, "ALIGNED": True, "BLOCK": 64}
    one.append(Specialisation("ranks", ranks_kernel, own))
    own = layers.score_constants(Kind(int(DType.BF16), int(DType.F32), True, True), 1)
    one.append(Specialisation("score", score.score_kernel, own))
    own = {"KIND": score.DELTA.value, "BIAS": 0, "DTYPE": 1, "MODEL_DTYPE": 1, "BASE_DTYPE": 1}
    one.append(_tiled("factored", score.factored_kernel, layers.factored_tile(1), own))
    written = {"X_DTYPE": 1, "OUT_DTYPE": 1, "HAS_OUT": True, "ACCUMULATE": True}
    own = {**written, "DTYPE": 0, "PACKED": True}
    one.append(_tiled("kron", kron_kernel, layers.kron_tile(1, 1), own))
    one.append(_tiled("finish", finish_kernel, layers.FINISH_TILE, written))
    for each in one:
        sizes = {name: 1 for name in _INTEGERS if name in each.kernel.arg_names and name != "stride"}
        yield replace(each, label=f"ones {each.label}", constants={**each.constants, **sizes})


def _layer_specialisations() -> Iterator[Specialisation]:
    """`score` and `kron`: every type and form, tiles of every size."""
    for dtype, aligned in ((DType.F32, True), (DType.BF16, True), (DType.BF16, False), (DType.F16, True)):
        constants = layers.score_constants(Kind(int(dtype), int(DType.F32), True, aligned), 1)
        label = f"score {dtype.name}{'' if aligned else ' unaligned'}"
        yield Specialisation(label, score.score_kernel, constants)
    types = [*(int(dtype) for dtype in DType), MIXED.value]
    for kind, dtype in itertools.product((score.SQUARE, score.DELTA), types):
        constants = {"KIND": kind.value, "BIAS": 1, "DTYPE": dtype, "MODEL_DTYPE": 1, "BASE_DTYPE": 1}
        tile = layers.factored_tile(dtype)
        yield _tiled(f"factored {kind.value} {dtype}", score.factored_kernel, tile, constants)
    written = {"X_DTYPE": 1, "OUT_DTYPE": 1, "HAS_OUT": True, "ACCUMULATE": True}
    for block, packed, dtype in itertools.product((16, 64, 128), (False, True), (0, MIXED.value)):
        constants = {**written, "DTYPE": dtype, "PACKED": packed}
        tile = layers.kron_tile(block, block)
        yield _tiled(f"kron {block}{' packed' if packed else ''} {dtype}", kron_kernel, tile, constants)
    yield _tiled("finish", finish_kernel, layers.FINISH_TILE, written)


def _tiled(label: str, kernel: Any, tile: dict[str, int], constants: dict[str, Any]) -> Specialisation:
    return Specialisation(label, kernel, {**constants, **tile}, fuses=True, options=layers.TILED)


def _combine(label: str, program: Program, kind: Kind, n_models: int) -> Specialisation:
    constants = launch.combine_constants(program, kind, n_models)
    fuses = program.reduce is Reduce.FUSED_SUM
    return Specialisation(f"combine {label}", combine_kernel, constants, fuses)


def _type_of(name: str) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in _REALS:
        return "*fp32"
    if name in _ADDRESSES:
        return "i64"
    if name == "scale":
        return "fp32"
    return "*fp64" if name == "nonfinite_sums" else "*i64"


def compile_one(one: Specialisation, architecture: int) -> Compiled:
    """Compiles for `sm_<architecture>` and reads what it uses and the code."""
    names = one.kernel.arg_names
    signature = {name: "constexpr" if name in one.constants else _type_of(name) for name in names}
    pointers = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = triton.compiler.ASTSource(one.kernel, signature, constexprs=one.constants, attrs=pointers)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=one.options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        registers, stack, local = map(int, _USAGE.findall(usage)[0])
        # A kernel without a stack and local memory spills nothing; to read its code would take long.
        code = _output(triton.knobs.nvidia.nvdisasm.path, binary) if stack or local else ""
    n_spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return Compiled(registers, n_spills, compiled.metadata.shared, ptx, tuple(_faults(one, ptx, n_spills)))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _faults(one: Specialisation, ptx: str, n_spills: int) -> Iterator[str]:
    if n_spills:
        yield "spills registers"
    if ".ftz" in ptx:
        yield "flushes subnormals"
    if re.search(r"\b(div\.(full|approx)|rcp\.approx)", ptx):
        yield "approximates a division"
    if re.search(r"\bfma\.", ptx) and not one.fuses:
        yield "contracts a product and a sum"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what `--only` selects, prints it, and returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="compile the kernels whose label begins with this")
    options = parser.parse_args(arguments)
    chosen = [one for one in specialisations() if one.label.startswith(options.only)]
    n_faulty = 0
    for one, architecture in itertools.product(chosen, ARCHITECTURES):
        found = compile_one(one, architecture)
        n_faulty += bool(found.faults)
        print(
            f"sm_{architecture} {one.label:24} {found.registers:4} registers {found.n_spills:3} spills "
            f"{found.shared_bytes:6} B shared {'; '.join(found.faults)}".rstrip(),
            flush=True,
        )
    print(f"{len(chosen)} kernels for {len(ARCHITECTURES)} architectures, {n_faulty} with faults")
    return 1 if n_faulty or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
