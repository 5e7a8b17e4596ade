"""The link between camera and server: bandwidth traces, loss, TCP, and how payloads become packets."""
