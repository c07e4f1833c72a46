"""Loads models, samples tokens, generates text."""
