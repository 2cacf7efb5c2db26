"""Training that merges as it goes: alternating tuning and merging of one model in memory."""

from tvfast.loops.alternating import Alternation, Round, Turn, alternate
from tvfast.loops.trainer import with_trainer

__all__ = ["Alternation", "Round", "Turn", "alternate", "with_trainer"]
