"""Checkpoints in memory: as modules of transformers, or as plain tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tvfast.checkpoint.reading import open_checkpoint
from tvfast.engine.reading import tensor_in_memory
from tvfast.errors import ArgumentError, CheckpointError

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Storage types by their safetensors names."""


def has_transformers_model(path: str) -> bool:
    """Whether a checkpoint names the class of its model, and transformers is installed.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    import importlib.util

    config = open_checkpoint(path).config or {}
    return bool(config.get("architectures")) and importlib.util.find_spec("transformers") is not None


def load_module(path: str, dtype: str | None, device: str) -> nn.Module:
    """The transformers model of a folder, in evaluation mode.

    Args:
        dtype: safetensors name of what its numbers are stored as; None: as its configuration says.

    Raises:
        ImportError: transformers is not installed.
        CheckpointError: it cannot be read.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "modules are loaded by transformers, which is not installed; run pip install 'tvfast[sweep]', or "
            "set receives: state_dict or folder."
        ) from None
    names = (open_checkpoint(path).config or {}).get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise CheckpointError(
            f"{path}: config.json names the architecture {names[0] or None!r}, which transformers has no "
            "class for; expected one. Set receives: state_dict or folder, and build the model in your "
            "function."
        )
    try:
        found: nn.Module = kind.from_pretrained(
            path, dtype="auto" if dtype is None else TORCH[dtype], local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path}: transformers cannot read it ({type(error).__name__}: {text}); expected a model "
            "directory."
        ) from None
    return on_device(found, device).eval()


def load_tensors(path: str, device: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, each in memory of its own.

    Raises:
        CheckpointError: it cannot be read, or has codes that are no numbers.
    """
    checkpoint = open_checkpoint(path)
    found: dict[str, Tensor] = {}
    for name, stored in checkpoint.tensors.items():
        if stored.operand not in TORCH:
            raise CheckpointError(
                f"{stored.path}: tensor {name!r} is stored as {stored.operand}; expected one of "
                f"{', '.join(TORCH)}. Set receives: folder."
            )
        with tensor_in_memory(stored) as view:
            raw = (
                torch.frombuffer(view, dtype=torch.uint8).clone()
                if len(view)
                else torch.empty(0, dtype=torch.uint8)
            )
        found[name] = raw.view(TORCH[stored.operand]).reshape(stored.shape).to(device)
    return found


def on_device(module: nn.Module, device: str) -> nn.Module:
    """The module there.

    Raises:
        ArgumentError: it is not here, or too small.
    """
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())[:200]
        raise ArgumentError(
            f"device {device!r} cannot be used ({text}); expected cpu, or a GPU of this machine with room "
            "for all models of the recipe."
        ) from None


def check_finite(path: str, tensors: Mapping[str, Any]) -> None:
    """Raise for a NaN or an infinity, as a merge of files does.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: tensor {name!r} has a NaN or an infinity; expected finite numbers. Repair the "
                "model, or set tvfast: {nonfinite: propagate} in the recipe."
            )
