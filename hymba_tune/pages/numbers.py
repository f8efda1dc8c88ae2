"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds, minutes or hours: ``42 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gigabytes(count: float) -> str:
    """Bytes in units of 2**30, with the digits that matter: ``0.62 GB``, ``8.9 GB``; in 2**20 if few: ``6.5 MB``."""
    size = count / 2**30
    if size < 0.1:
        return f"{1024 * size:.1f} MB"
    return f"{size:.{2 if size < 1 else 1}f} GB"


def share(part: float, whole: float) -> str:
    """A part in per cent, never rounded to nothing or to all: ``38 %``, ``< 1 %``."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 1:
        return "< 1 %"
    return "> 99 %" if 99 < percent < 100 else f"{percent:.0f} %"
