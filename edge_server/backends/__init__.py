"""Where the tail runs: embedded, or Ray Serve."""
