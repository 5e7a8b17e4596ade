"""What every cut of a model would cost, measured."""
