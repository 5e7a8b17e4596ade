"""The device: capture, head, session, control."""

import os

# gRPC's C library writes to standard error by itself; what matters is said in our own words. It reads this once, when loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
