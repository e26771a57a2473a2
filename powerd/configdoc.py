"""docs/configuration.md out of powerd.config: ``python -m powerd.configdoc > docs/configuration.md``; a test keeps it current.

House rules: pure; every word about a key stands in powerd.config.
"""
# ruff: noqa: E501 (rows of Markdown tables cannot be wrapped)

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from powerd.config import Config, keys

_HEAD = """# Configuration

Made by `python -m powerd.configdoc`; do not edit.

powerd reads one TOML file, `/etc/powerd/powerd.toml` (as an ordinary user `$XDG_CONFIG_HOME/powerd/powerd.toml`), and then every
`powerd.d/*.toml` beside it in order. A file that is wrong anywhere is refused as a whole, with file, line and the nearest valid
name, exit code 78. `powerd check-config [FILE]` says so without starting anything. `SIGHUP` reads it anew; a file that is wrong then
changes nothing, and `GET /v1/node` shows the error. `daemon.run_dir`, `daemon.state_dir`, `[store]`, `metrics.enabled`, `[influx]` and
`tcp.listen` take effect at the next start; `[hw]`, `[limits]` and `[baseline]` are read by powerd-hw itself as well, which trusts only
a file that root or its own user alone can write.
"""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The whole page as Markdown."""
    lines = [_HEAD]
    ranges = {
        (section.name, f.name): f.metadata
        for section in fields(Config)
        for f in fields(type(getattr(Config(), section.name)))
    }  # fmt: skip
    section_now = ""
    for section, key, default, text in keys():
        if section != section_now:
            section_now = section
            about = (type(getattr(Config(), section)).__doc__ or "").partition(": ")[2]
            lines += [
                f"\n## `[{section}]`\n",
                about[:1].upper() + about[1:],
                "\n| key | default | range | meaning |",
                "|---|---|---|---|",
            ]
        metadata = ranges[section, key]
        span = ", ".join(metadata["one_of"]) or (
            f"{metadata['low']:g}..{metadata['high']:g}" if metadata["low"] is not None else ""
        )
        lines.append(f"| `{key}` | `{_value(default)}` | {span} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
