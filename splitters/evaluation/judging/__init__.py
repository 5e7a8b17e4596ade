"""What an answer is worth: labels of several kinds, or agreement with the whole model."""
