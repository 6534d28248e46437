"""Encoded bytes -> upright RGB -> uint8 pixels at the model's size."""
