"""From a trained run to a bundle."""
