"""Where something stands in a TOML text, which tomllib does not say.

House rules: pure; what cannot be told is line 1.
"""

from __future__ import annotations

import re


def line_of(text: str, section: str, key: str) -> int:
    """Where a key (or, with key "", a section) stands, which tomllib does not say; 1 when it cannot be told."""
    section_name, key_name = re.escape(section), re.escape(key)
    dotted = re.compile(rf"\s*{section_name}\s*\.\s*{key_name}\s*=" if key else rf"\s*[\"']?{section_name}[\"']?\s*[=.]")
    plain = re.compile(rf"\s*[\"']?{key_name}[\"']?\s*=")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            here = match[1].strip("\"' ")
            if not key and here == section:
                return number
        elif dotted.match(line) or (key and here == section and plain.match(line)):
            return number
    return 1
