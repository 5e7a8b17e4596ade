"""What several verbs share: arguments, progress, and failures of the machine."""
