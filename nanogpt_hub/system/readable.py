"""Values as people read them, and nested settings by their dotted names.

    reason(OSError(28, "No space left", "a"))                # "No space left: a"
    size(3_280_000), count(10_700_000), duration(5400)       # "3.3 MB", "10.7 million", "1.5 hours"
    flatten({"optim": {"name": "adamw"}})                    # {"optim.name": "adamw"}

Standard library only.
"""

from collections.abc import Mapping
from typing import Any


def size(n_bytes: float) -> str:
    """Bytes in powers of 1,000, as the Hub shows them."""
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:,.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def count(n: int) -> str:
    """A number of parameters or tokens: 10.7 million, or 102,345."""
    for limit, unit in ((10**9, "billion"), (10**6, "million")):
        if n >= limit:
            return f"{n / limit:,.1f} {unit}"
    return f"{n:,}"


def duration(seconds: float) -> str:
    """A span of time: 1.5 hours, 48 seconds."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "less than a second"


def reason(error: BaseException) -> str:
    """An error without its number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted name: value}, without those that are empty or None."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            flat[f"{prefix}{key}"] = value
    return flat
