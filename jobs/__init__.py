"""The jobs: one file per command, each a chain that is read from top to bottom."""
