"""What a prefilter is worth: curves and passages, and the fit to one scene."""
