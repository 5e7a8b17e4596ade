"""Access: who calls, and how much each caller may use."""
