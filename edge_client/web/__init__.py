"""The live page of the device: what the camera sees, what became of it, and why. Nothing waits for a browser."""
