"""Tails on Ray Serve; only this room imports Ray."""
