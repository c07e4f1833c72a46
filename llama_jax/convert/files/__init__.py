"""Reads and writes files of tensors: safetensors and PyTorch's."""
