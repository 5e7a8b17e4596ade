"""Events: an object appeared, is still there, left; how many there are; whether the server is there. And who is told."""
