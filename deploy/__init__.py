"""Deployment files, and the simulated network testbed."""
