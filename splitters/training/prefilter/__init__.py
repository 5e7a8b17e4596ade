"""Trains the prefilter and measures what it can promise."""
