"""Files of checkpoints: where tensors lie in them, how new ones are laid out. Nothing is computed here."""

from __future__ import annotations
