"""Bandwidth: the bitrate each session is granted, from what its arrivals tell about the link."""
