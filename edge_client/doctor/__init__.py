"""``edge-client doctor``: looks at what a camera needs, and says what is wrong before anything runs."""
