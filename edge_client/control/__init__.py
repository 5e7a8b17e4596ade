"""When to send what: estimator and controller, pure functions of time and acknowledgements."""
