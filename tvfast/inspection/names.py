"""Names of tensors as places in a model: the layer, and the kind of module."""

from __future__ import annotations


def layer_of(name: str) -> str:
    """ "model.layers.3" for "model.layers.3.mlp.up_proj.weight", "lm_head" for "lm_head.weight"."""
    parts = name.split(".")
    at = _number(parts)
    return ".".join(parts[: at + 1]) if at else parts[0]


def module_of(name: str) -> str:
    """ "mlp.up_proj" for the same, "experts.*.up_proj" for each of a layer's experts; "bias" is kept."""
    parts = name.split(".")
    at = _number(parts)
    inner = parts[at + 1 :] if at else parts
    if len(inner) > 1 and inner[-1] == "weight":
        inner = inner[:-1]
    return ".".join("*" if part.isdecimal() else part for part in inner)


def _number(parts: list[str]) -> int:
    """Where the number of the layer is; 0: nowhere."""
    return next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), 0)
