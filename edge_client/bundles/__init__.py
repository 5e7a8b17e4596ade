"""The server's models on this device: fetched, stored, tried, opened, replaced."""
