"""What a model learned, as a low-rank adapter of its base."""

from __future__ import annotations

from tvfast.extraction.extracting import Extraction, extract_lora

__all__ = ["Extraction", "extract_lora"]
