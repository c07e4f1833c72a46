"""Measures the quality of a model."""
