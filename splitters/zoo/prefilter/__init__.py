"""The prefilter: send a frame or stop it."""
