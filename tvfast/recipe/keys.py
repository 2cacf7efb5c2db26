"""Which parameters a method takes in a recipe, by the names that mergekit gives them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType

from tvfast.methods import METHODS, MethodInfo

PEER_KEYS = frozenset(
    {
        "alpha",
        "density",
        "epsilon",
        "eps",
        "filter_wise",
        "gamma",
        "int8_mask",
        "lambda",
        "max_iter",
        "normalize",
        "normalize_weights",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "r",
        "rescale",
        "scale",
        "select_topk",
        "t",
        "tol",
        "weight",
    }
)
"""Parameters of any method of mergekit 0.1.5."""

_OUR_NAMES = {"lambda": "scale", "weight": "weights"}
WORDS = (
    "cross",
    "direction",
    "drop",
    "granularity",
    "importance",
    "normalization",
    "outside",
    "scope",
    "source",
    "target",
)
"""Parameters of any method that are words."""

OWN_KEYS = frozenset({"seed", "tie", "dialect", *WORDS})
"""Parameters that a recipe has under `tvfast`."""

_PASSTHROUGH = "passthrough"

# Parameters that our methods have and mergekit's of the same names have not, so that it ignores them.
_NOT_IN_PEER = MappingProxyType(
    {
        "karcher": frozenset({"lambda", "weight"}),
        "linear": frozenset({"lambda"}),
        "model_stock": frozenset({"lambda"}),
        "multislerp": frozenset({"lambda", "task_vectors"}),
        "nearswap": frozenset({"lambda"}),
        "nuslerp": frozenset({"lambda", "task_vectors"}),
        "passthrough": frozenset({"lambda"}),
        "ram": frozenset({"lambda"}),
        "ramplus_tl": frozenset({"lambda"}),
        "sce": frozenset({"lambda", "weight"}),
        "slerp": frozenset({"lambda"}),
    }
)
BASE_IS_AN_INPUT = frozenset({"karcher"})
"""Methods for which mergekit takes `base_model` as one more model, since they know no base."""

_REQUIRED = MappingProxyType({"nearswap": "t", "slerp": "t"})  # besides `weight`, where a method has it


@dataclass(frozen=True, slots=True)
class Key:
    """One parameter of a method.

    Attributes:
        name: in a recipe.
        keyword: of our method.
        per_model: every model has its own; otherwise there is one for the tensor.
        flag: true or false.
        required: no default.
        default: per model, for those without a value; None: if one model has a value, all need one.
    """

    name: str
    keyword: str
    per_model: bool
    flag: bool
    required: bool
    default: float | None


def method_keys(method: str, dialect: str) -> dict[str, Key]:
    """The parameters that a recipe may give to a method, by name."""
    info = METHODS[method]
    found = (_key(info, name, dialect) for name in _names(info))
    hidden = _NOT_IN_PEER.get(method, frozenset()) if dialect == "mergekit" else frozenset()
    return {key.name: key for key in found if key.name not in hidden}


def _names(info: MethodInfo) -> list[str]:
    return [parameter.name for parameter in info.parameters if parameter.name not in OWN_KEYS]


def _key(info: MethodInfo, keyword: str, dialect: str) -> Key:
    """Our parameter as a recipe's key; the types of its field tell the rest."""
    field = next(field for field in fields(info.cls) if field.name == keyword)
    name = {ours: theirs for theirs, ours in _OUR_NAMES.items()}.get(keyword, keyword)
    if info.name == _PASSTHROUGH and keyword == "weights":
        name = "scale"  # the multiplier of the one model
    default = float(field.default) if isinstance(field.default, int | float) else None
    if keyword == "weights":
        default = 1.0
    required = dialect == "mergekit" and (name == "weight" or name == _REQUIRED.get(info.name))
    kind = str(field.type)
    return Key(name, keyword, "PerModel" in kind, "bool" in kind, required, default)
