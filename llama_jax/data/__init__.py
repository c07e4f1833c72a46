"""Tokenizes a corpus into token shards, and reads batches from them."""
