"""One module per verb of the `splitters` command line."""
