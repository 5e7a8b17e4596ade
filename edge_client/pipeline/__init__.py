"""A frame's way from the source to its outcome: the ledger, server, local model, and what live and file sources do differently."""
