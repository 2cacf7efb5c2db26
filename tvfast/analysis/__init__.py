"""What merging does to predictions: disentanglement, fairness between groups, heads on frozen backbones."""

from __future__ import annotations

from tvfast.analysis.disentanglement import DisentanglementMap, disagreement, disentanglement
from tvfast.analysis.fairness import (
    Fairness,
    FairnessRow,
    fairest,
    fairness,
    fairness_sweep,
    injection_sweep,
)
from tvfast.analysis.pictures import draw_disentanglement, draw_fairness
from tvfast.analysis.probing import aligned_head, linear_probe

__all__ = [
    "DisentanglementMap",
    "Fairness",
    "FairnessRow",
    "aligned_head",
    "disagreement",
    "disentanglement",
    "draw_disentanglement",
    "draw_fairness",
    "fairest",
    "fairness",
    "fairness_sweep",
    "injection_sweep",
    "linear_probe",
]
