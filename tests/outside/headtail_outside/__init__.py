"""What a package outside of headtail adds to it."""
