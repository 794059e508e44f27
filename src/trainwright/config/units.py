"""Numbers with units, as people write them: "1e9", "10_000", "3h50m"."""

from __future__ import annotations

import re
from typing import Any

_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?"
)
_MOST = 2**53  # whole numbers beyond it are no longer exact in a float, nor in JSON
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_count(value: Any) -> Any:
    """`"1e9"`, `"10_000"` and `8.0` to an int; anything else is left for the schema to refuse."""
    if isinstance(value, bool):
        raise ValueError("a whole number is needed, not true or false")
    if isinstance(value, str):
        try:
            value = float(value.strip().replace("_", "")) if re.search(r"[eE.]", value) else int(value.strip())
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > _MOST:
        raise ValueError(f"a whole number of at most {_MOST:,} is needed")
    return value


def parse_duration_s(value: Any) -> Any:
    """`"3h50m"` to seconds; plain numbers are seconds already."""
    if isinstance(value, bool):
        raise ValueError("a time such as 3m or 3h50m is needed, not true or false")
    if isinstance(value, str):
        text = value.strip().lower().replace(" ", "")
        match = _DURATION.fullmatch(text)
        if not text or match is None:
            raise ValueError("a time such as 90s, 3m or 3h50m is needed")
        return sum(float(number) * _SECONDS[unit] for unit, number in match.groupdict().items() if number)
    return value
