"""Encodes text as token ids, and decodes them."""
