"""Saves and loads model folders and training checkpoints."""
