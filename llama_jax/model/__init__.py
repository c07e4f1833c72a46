"""The model: weights as modules, the forward pass as functions."""
