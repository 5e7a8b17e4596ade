"""Frames predicted from an earlier one: which cells change, from where, and by how much."""
