"""Bytes as people write them: "2 GiB", "1.5GB". Pure."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS |= {f"{u}b": f for u, f in _UNITS.items() if u not in ("", "b")}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def bytes_of(text: str) -> int:
    """At least 1: "500000000", "2 GiB", "1.5GB". Raises ValueError, saying what was expected."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(found[2].lower()) if found else None
    n_bytes = round(float(found[1]) * unit) if found and unit else 0
    if n_bytes < 1:
        raise ValueError(f"bytes or a size such as '2 GiB', not {text!r}")
    return n_bytes
