"""Names of the classes of public datasets."""
