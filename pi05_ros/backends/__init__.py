"""Implementations of the model's stages, chosen by name and per stage."""
