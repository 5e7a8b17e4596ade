"""Which frames need no answer of their own, and which of an answer's boxes count."""
