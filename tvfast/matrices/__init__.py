"""Merges of whole tensors, most with torch: row by row, by divergence, by singular vectors."""
