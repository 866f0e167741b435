"""What a user can ask for: one file a job kind, wiring only."""
