"""Continuous batching: one running batch serves many requests."""
