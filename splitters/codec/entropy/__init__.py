"""Entropy coding in exact integers: contexts, residuals as symbols, and the range coder."""
