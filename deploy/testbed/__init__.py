"""The testbed: what a split-computing system does on a bad network, simulated, shaped or relayed."""
