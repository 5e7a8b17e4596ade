"""Frames: from the layers of a payload to what a tail takes."""
