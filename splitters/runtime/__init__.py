"""Runs what a bundle holds: the part that device, server and evaluation share."""
