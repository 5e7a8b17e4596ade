"""Doors: what callers speak to the server, and how a call becomes an answer."""
