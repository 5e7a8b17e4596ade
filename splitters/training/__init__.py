"""Training: losses, loop, photographs, recipes."""
