"""Readers and writers of the files that checkpoints consist of."""
