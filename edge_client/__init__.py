"""The device: capture, head, session, control."""
