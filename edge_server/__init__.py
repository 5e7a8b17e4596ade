"""The edge: ingress, batcher, tail, bandwidth grants."""
