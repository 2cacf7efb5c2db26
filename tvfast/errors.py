"""Exceptions. Each says where, what was found, what was expected and what to do."""

from __future__ import annotations


class TvfastError(Exception):
    """Base of every error that tvfast raises on purpose."""


class ArgumentError(TvfastError, ValueError):
    """An argument has a value, type or count that the function does not take."""


class ShapeError(ArgumentError):
    """Tensors that must have the same shape do not."""


class DTypeError(ArgumentError):
    """A tensor has a dtype that cannot be merged, or differs from what is required."""


class DeviceError(ArgumentError):
    """Tensors are on different devices, or on one that no backend serves."""


class LayoutError(ArgumentError):
    """A tensor is not contiguous, or overlaps another in part."""


class StateDictError(ArgumentError):
    """State dicts or modules differ in their sets of names."""


class UnknownNameError(ArgumentError):
    """A method, parameter or option that does not exist; the nearest known one is named."""


class BackendError(TvfastError, RuntimeError):
    """No backend, or not the forced one, can run the call."""


class CheckpointError(TvfastError, ValueError):
    """A file of a checkpoint is missing, damaged or not what it should be."""


class AdapterError(CheckpointError):
    """An adapter that cannot be applied: of another base, of another kind, or incomplete."""


class StatisticsError(CheckpointError):
    """Statistics of a model that are missing, damaged, not finite, or of another model."""


class RecipeError(ArgumentError):
    """A recipe is not one: its YAML, a key or a value."""


class MergeError(TvfastError, RuntimeError):
    """A merge of checkpoints cannot go on; what is finished is kept for `--resume`."""


class SolveError(MergeError):
    """The equations of a layer have no usable solution: singular or non-finite factors."""


class OutputError(MergeError):
    """The output directory cannot be used, or written."""


class RankError(MergeError):
    """A rank of a merge by several failed, is lost, or was asked for another merge than the others."""


class EvaluationError(TvfastError, RuntimeError):
    """A function that judges merges raised, or returned something else than numbers."""


class PeerError(TvfastError, ImportError):
    """A library that an integration accelerates is missing, or of a version that it does not know."""
