"""What a run tells people and monitoring: the status line, the summary, metrics, traces, answers in words."""
