"""Curvature: Kronecker factors of a model on data, a penalty for fine-tuning, and merges that weigh by it."""

from __future__ import annotations

from tvfast.curvature.collecting import collect
from tvfast.curvature.merging import merge
from tvfast.curvature.penalty import KroneckerPenalty
from tvfast.curvature.probes import Exact, Gaussian, Losses, Probe, SampledLabels
from tvfast.curvature.tasks import Tasks
from tvfast.curvature.tracking import CONVENTIONS
from tvfast.factors.records import Curvature, Statistics, load

__all__ = [
    "CONVENTIONS",
    "Curvature",
    "Exact",
    "Gaussian",
    "KroneckerPenalty",
    "Losses",
    "Probe",
    "SampledLabels",
    "Statistics",
    "Tasks",
    "collect",
    "load",
    "merge",
]
