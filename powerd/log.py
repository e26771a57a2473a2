"""One logfmt line per state change on stdout; journald or the operator's shipper takes it from there.

House rules: no line per sample; values are escaped, so that a client's text cannot forge a line.
"""

from __future__ import annotations

import json
import re
import sys

_PLAIN = re.compile(r"[A-Za-z0-9_.:/@,+-]+")


def _value(value: object) -> str:
    text = "true" if value is True else "false" if value is False else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def log(event: str, **fields: object) -> None:
    """Write ``event=... key=value ...``; fields that are ``None`` are left out."""
    parts = [f"event={_value(event)}", *(f"{k}={_value(v)}" for k, v in fields.items() if v is not None)]
    try:
        sys.stdout.write(" ".join(parts) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # nobody listens to our log: no reason to stop
