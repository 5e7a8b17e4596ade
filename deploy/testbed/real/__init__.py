"""The same scenarios between real processes, over a shaped loopback or two network namespaces."""
