"""Continuous batching: many requests in one running batch."""
