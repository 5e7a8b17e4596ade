"""What goes into a model and what its outputs mean: preprocessing, decoding, boxes."""
