"""Trains our small detector and its bottleneck."""
