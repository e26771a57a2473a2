"""docs/configuration.md out of powerd.config: ``python -m powerd.configdoc > docs/configuration.md``; a test keeps it current.

House rules: pure; every word about a key stands in powerd.config.
"""
# ruff: noqa: E501 (rows of Markdown tables cannot be wrapped)

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from powerd.config import Config, StaticReplica, keys, sections

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
    if isinstance(value, tuple):
        return "[]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The whole page as Markdown."""
    lines = [_HEAD]
    kinds = {name: type(getattr(Config(), name)) for name in sections()} | {"replica": StaticReplica}
    ranges = {(section, f.name): f.metadata for section, kind in kinds.items() for f in fields(kind)}
    rows = [*keys(), *(("replica", f.name, f.default, str(f.metadata["help"])) for f in fields(StaticReplica))]
    section_now = ""
    for section, key, default, text in rows:
        if section != section_now:
            section_now = section
            about = (kinds[section].__doc__ or "").partition(": ")[2]
            lines += [
                "\n## `[[replica]]`\n" if section == "replica" else f"\n## `[{section}]`\n",
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
