"""The `pi05` command: one file per verb."""
