"""Grids and compile-time choices: what runs the kernels over a work table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from tvfast.kernels.combine import combine_kernel
from tvfast.kernels.measure import ALONE, DOTS, VOTES, measure_kernel, planes_kernel
from tvfast.kernels.sums import LIMBS, WINDOWS
from tvfast.kernels.table import Kind, Launch, device_scalars
from tvfast.kernels.totals import total

from tvfast.program import Ballot, Cross, Keep, Program, TensorScalars, Tie, Vote, Weighting

MOST_HELD = 8
"""Models whose entries stay in registers; with more, kernels read them again where they need them twice."""

EXACT = {"enable_fp_fusion": False, "num_warps": 4}
"""Options of every launch: a product and a sum are never contracted."""

if torch.version.hip is None:
    # Without a stated limit ptxas 12.9 and 13.4 spill a few values at 64 to 96 registers, for occupancy.
    EXACT["maxnreg"] = 255

_READ_TIES = (Keep.BAND, Keep.SCORE, Keep.VARIANCE)


def block_of(n_models: int) -> int:
    """Elements that a program instance holds at once: 8 of each model in a thread, 4 if there are many."""
    return 1024 if n_models <= 4 else 512


def held_of(n_models: int) -> int:
    """The compile-time count of models, or 0 for a loop."""
    return n_models if n_models <= MOST_HELD else 0


def keep_constants(program: Program, kind: Kind) -> dict[str, Any]:
    """Compile-time arguments of the keep stage; a tie rule that is not read does not make another kernel."""
    return {
        "KEEP": int(program.keep),
        "TIE": int(program.tie if program.keep in _READ_TIES else Tie.GE),
        "CROSS": int(program.cross if program.keep is Keep.SCORE else Cross.NONE),
        "DTYPE": kind.dtype,
        "HAS_BASE": kind.subtracts,
        "ALIGNED": kind.aligned,
    }


def combine_constants(program: Program, kind: Kind, n_models: int) -> dict[str, Any]:
    """Compile-time arguments of `combine_kernel`; stages that are not read are at their defaults."""
    votes = program.vote is not Vote.NONE
    return {
        **keep_constants(program, kind),
        "ADDS_BASE": kind.has_base,
        "K": held_of(n_models),
        "GAIN": int(program.gain),
        "WEIGHTING": int(program.weighting),
        "VOTE": int(program.vote),
        "BALLOT": int(program.ballot) if votes else 0,
        "ZERO_SIGN": int(program.zero_sign) if votes else 0,
        "MEMBERS": int(program.members),
        "REDUCE": int(program.reduce),
        "DIVISOR": int(program.divisor),
        "OUT_KIND": kind.out_dtype,
        "BLOCK": block_of(n_models),
    }


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one, since Triton launches on that."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def combine(launch: Launch, program: Program, scalars: Sequence[TensorScalars]) -> None:
    """Writes the outputs of a launch's entries."""
    own = device_scalars(launch, scalars)
    combine_kernel[(launch.n_tiles,)](
        launch.fields,
        launch.stride,
        launch.first_tiles,
        len(launch.numbers),
        own.tensors,
        own.reals,
        own.wholes,
        launch.n_models,
        **combine_constants(program, launch.kind, launch.n_models),
        **EXACT,
    )


def planes(launch: Launch, program: Program, scalars: Sequence[TensorScalars]) -> None:
    """Writes what the keep stage keeps into the bit planes of a launch's entries."""
    own = device_scalars(launch, scalars)
    planes_kernel[(launch.n_tiles,)](
        launch.fields,
        launch.stride,
        launch.first_tiles,
        len(launch.numbers),
        own.reals,
        own.wholes,
        launch.n_models,
        **keep_constants(program, launch.kind),
        BLOCK=block_of(launch.n_models),
        **EXACT,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of a launch's entries, in its order, on the host."""

    sums: list[list[float]]  # [n_entries][S]: L1 before [K], L1 [K], Gram [K, K] with j <= k filled, dots [K]
    # [n_entries][C]: kept, non-zero, non-finite [K] each; base, elected, conflict; alone [K]
    counts: list[list[int]]


def measure_constants(program: Program, kind: Kind, n_models: int, wants: int) -> dict[str, Any]:
    """Compile-time arguments of `measure_kernel`."""
    votes = bool(wants & VOTES.value) and program.vote is not Vote.NONE
    weighted = votes and program.ballot is Ballot.WEIGHTED
    n_dots = n_models if wants & DOTS.value else 0
    n_alone = n_models if wants & ALONE.value else 0
    return {
        **keep_constants(program, kind),
        "ADDS_BASE": kind.has_base,
        "WANTS": wants,
        "S": triton.next_power_of_2(2 * n_models + n_models * n_models + n_dots),
        "C": triton.next_power_of_2(3 * n_models + 3 + n_alone),
        "GAIN": int(program.gain) if votes else 0,
        "WEIGHTING": int(program.weighting if weighted else Weighting.MODEL),
        "VOTE": int(program.vote) if votes else 0,
        "BALLOT": int(program.ballot) if votes else 0,
        "BLOCK": block_of(n_models),
    }


def measure(launch: Launch, program: Program, scalars: Sequence[TensorScalars], wants: int) -> Measured:
    """Sums, counts and votes of a launch's entries; waits for the device."""
    own = device_scalars(launch, scalars)
    constants = measure_constants(program, launch.kind, launch.n_models, wants)
    n_entries, device = len(launch.numbers), launch.fields.device
    n_sums, n_counts = constants["S"], constants["C"]
    limbs = torch.zeros(n_entries, n_sums, WINDOWS.value, LIMBS.value, dtype=torch.int64, device=device)
    nonfinite = torch.zeros(n_entries, n_sums, dtype=torch.float64, device=device)
    counts = torch.zeros(n_entries, n_counts, dtype=torch.int64, device=device)
    measure_kernel[(launch.n_tiles,)](
        launch.fields,
        launch.stride,
        launch.first_tiles,
        n_entries,
        own.tensors,
        own.reals,
        own.wholes,
        launch.n_models,
        limbs,
        nonfinite,
        counts,
        **constants,
        **EXACT,
    )
    sums = [
        [total(*one) for one in zip(slots, extra, strict=True)]
        for slots, extra in zip(limbs.tolist(), nonfinite.tolist(), strict=True)
    ]
    return Measured(sums, counts.tolist())
