"""Processes, hosts, accelerators, storage and the console."""
