"""How long something takes, and how fast it is, for people."""

from __future__ import annotations

from rich.filesize import decimal


def duration(seconds: float) -> str:
    """Such as ``0.35 s``, ``40 s``, ``12 min``, ``3 h 12 min`` or ``2 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def speed(bytes_a_second: float) -> str:
    """Such as ``0.25 GB/s``, or ``8.1 MB/s`` where that would be next to nothing."""
    gb = bytes_a_second / 1e9
    return f"{gb:.2f} GB/s" if gb >= 0.01 else f"{decimal(int(bytes_a_second))}/s"
