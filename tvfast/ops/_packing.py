"""Programs and scalars as the lists of numbers that an operator's schema takes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from tvfast.program import ModelScalars, Program, TensorScalars

_TENSOR_REALS = 4
_MODEL_REALS = 6
_MODEL_WHOLES = 7
_WORD = 2**64
_STAGES = tuple(fields(Program))  # known beforehand, since a compiler does not trace `fields`


def pack_program(program: Program) -> list[int]:
    """The choices in the order of their declaration."""
    return [int(getattr(program, stage.name)) for stage in _STAGES]


def unpack_program(choices: Sequence[int]) -> Program:
    """The program of `pack_program`."""
    stages = zip(_STAGES, choices, strict=True)
    return Program(**{stage.name: cast(Any, type(stage.default))(choice) for stage, choice in stages})


def pack_scalars(scalars: TensorScalars) -> tuple[list[float], list[int]]:
    """Reals, those of the tensor and then of each model; and 64-bit words per model, as signed integers."""
    reals = [scalars.scale, scalars.majority, scalars.divisor_floor, scalars.divisor_fill]
    wholes: list[int] = []
    for m in scalars.models:
        reals += [m.weight, m.gain, m.lo, m.hi, m.prob, m.prob_step]
        words = [m.lo_cut, m.hi_cut, m.limit, m.limit_step, m.rank_lo, m.rank_hi, m.key]
        wholes += [word - _WORD if word >= _WORD // 2 else word for word in words]
    return [float(real) for real in reals], wholes


def unpack_scalars(reals: Sequence[float], wholes: Sequence[int]) -> TensorScalars:
    """The scalars of `pack_scalars`."""
    scale, majority, floor, fill = reals[:_TENSOR_REALS]
    models = []
    for k in range(len(wholes) // _MODEL_WHOLES):
        start = _TENSOR_REALS + k * _MODEL_REALS
        weight, gain, lo, hi, prob, prob_step = reals[start : start + _MODEL_REALS]
        words = [word % _WORD for word in wholes[k * _MODEL_WHOLES : (k + 1) * _MODEL_WHOLES]]
        lo_cut, hi_cut, limit, limit_step, rank_lo, rank_hi, key = words
        models.append(
            ModelScalars(
                weight=weight,
                gain=gain,
                lo=lo,
                hi=hi,
                lo_cut=lo_cut,
                hi_cut=hi_cut,
                limit=limit,
                limit_step=limit_step,
                prob=prob,
                prob_step=prob_step,
                rank_lo=rank_lo,
                rank_hi=rank_hi,
                key=key,
            )
        )
    return TensorScalars(
        models=models, scale=scale, majority=majority, divisor_floor=floor, divisor_fill=fill
    )
