"""The `dist-tl` command: verbs only."""
