"""The models that have names: one folder each, with its network, split, export and weights."""
