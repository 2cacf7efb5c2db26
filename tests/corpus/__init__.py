"""Broken checkpoints, made by code: one builder per defect, with what the error must say."""
