"""Replays a scenario in virtual time, with the real controller on a modelled device, link and server."""
