"""Checkpoints and prompts, and the actors that run a model over pixels."""
