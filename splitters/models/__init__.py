"""The networks: base models, slimmable layers, bottlenecks, detector, prefilter."""
