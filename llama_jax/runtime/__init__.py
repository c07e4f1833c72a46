"""Hosts, signals, accelerators, memory, files and the console."""
