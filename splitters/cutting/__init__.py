"""How a model is cut: trace it to a graph, partition the graph, prove that the two halves are the whole."""
