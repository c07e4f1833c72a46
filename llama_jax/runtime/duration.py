"""Formats durations. Imports no JAX."""


def format_duration(seconds: float) -> str:
    """Returns '3d04h', '2h05m', '4m09s' or '12s'."""
    s = round(seconds)
    if s >= 86_400:
        return f"{s // 86_400}d{s % 86_400 // 3600:02d}h"
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
