"""Our small detector and its learned split."""
