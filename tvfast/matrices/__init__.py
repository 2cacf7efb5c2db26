"""Merges of whole tensors with torch: row by row, by divergence, by singular vectors."""
