"""Numbers as people read them: durations, sizes in bytes and shares."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours: ``42 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Bytes in units of 2**30 (GB), or 2**20 (MB) below 0.1 GB: ``8.9 GB``, ``0.62 GB``, ``6.5 MB``."""
    gigabytes = count / 2**30
    if gigabytes < 0.1:
        return f"{count / 2**20:.1f} MB"
    return f"{gigabytes:.{2 if gigabytes < 1 else 1}f} GB"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent; 0 % and 100 % are exact: ``38 %``, ``< 1 %``, ``> 99 %``."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 1:
        return "< 1 %"
    return "> 99 %" if 99 < percent < 100 else f"{percent:.0f} %"
