"""A torch model as a graph: traced, made functional, partitioned, and the partition proved."""
