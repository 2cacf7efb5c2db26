"""Whole checkpoints: families to merge, and merges timed as processes."""
