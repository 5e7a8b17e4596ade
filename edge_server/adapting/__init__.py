"""Fits bundles to what this server's cameras show, from the symbols that it decoded anyway."""
