"""Generates nvml/symbols.h: every NVML function that the Python bindings on this machine look up.

House rules: bindings are read as text, never imported; names are only ever added, so that older bindings keep working;
`python -m powerd.sim.symbols [FILE...]` rewrites the header.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from powerd.sim.build import SOURCES

HEADER = SOURCES / "symbols.h"
BINDINGS = ("pynvml", "py3nvml.py3nvml")
_LOOKUP = re.compile(r'_nvmlGetFunctionPointer\(\s*"(nvml\w+)"')


def looked_up(source: str) -> set[str]:
    """Return the names that a binding's source text looks up."""
    return set(_LOOKUP.findall(source))


def known() -> set[str]:
    """Return the names that the simulated driver has a function or a stub for."""
    return set(re.findall(r"STUB\((\w+)\)", HEADER.read_text()))


def with_older(names: Iterable[str]) -> set[str]:
    """Add the unversioned and lower-versioned twins of every versioned name."""
    out = set(names)
    for name in names:
        match = re.fullmatch(r"(\w+?)_v(\d+)", name)
        if match:
            out.add(match[1])
            out.update(f"{match[1]}_v{n}" for n in range(1, int(match[2])))
    return out


def installed_sources() -> list[Path]:
    """Return the source files of the bindings installed here."""
    found = []
    for name in BINDINGS:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin:
            found.append(Path(spec.origin))
    return found


def main(files: list[str]) -> int:
    """Rewrite the header from the given binding sources, or from those installed."""
    sources = [Path(file) for file in files] or installed_sources()
    names = known().union(*(looked_up(path.read_text()) for path in sources))
    HEADER.write_text("".join(f"STUB({name})\n" for name in sorted(with_older(names))))
    print(f"{len(with_older(names))} functions in {HEADER.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
