"""Peers side by side, on the same inputs in one run; see NOTES.md for what was measured."""
