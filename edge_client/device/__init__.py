"""The device's own work: the head, the local model, how long both take here, and the one worker that runs them."""
