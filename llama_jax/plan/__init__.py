"""Compiles a run for a pod that is not there, and tells what it will need and reach."""
