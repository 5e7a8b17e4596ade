"""Frigate's remote detector: its ZMQ protocol at the front, head here and tail there behind it."""
