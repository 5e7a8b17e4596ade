"""Observation: the server's metrics and traces."""
