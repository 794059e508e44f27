"""Numbers as people read them: one place, so that the console, the report and doctor say them alike."""

from __future__ import annotations

import math


def count(number: float) -> str:
    """A count in three digits: 950, 12.3k, 5.61M, 1.2B (10^9), 3.4T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.0f}{letter}" if abs(scaled) >= 99.95 else f"{scaled:.3g}{letter}"
    return f"{number:.0f}" if float(number).is_integer() or abs(number) >= 100 else f"{number:.3g}"


def byte_size(size_bytes: float) -> str:
    """Bytes in binary units: 812 B, 5.3 MiB, 1.25 GiB."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size_bytes) >= size:
            return f"{size_bytes / size:.3g} {unit}" if size_bytes < 1000 * size else f"{size_bytes / size:,.0f} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A time span: 0.42 s, 48 s, 2:31 min, 3:05:10 h, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def percent(share: float | None) -> str:
    """A share 0..1 as a percentage in two or three digits; a dash where there is none."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{share * 100:.1f}%" if share < 0.9995 else f"{share * 100:.0f}%"


def figure(value: float | None, digits: int = 4) -> str:
    """A measured value, `digits` significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.{max(digits - 2, 0)}e}"
    return f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{max(digits - len(str(int(abs(value)))), 0)}f}"
