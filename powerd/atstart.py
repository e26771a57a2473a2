"""What of the configuration waits for a restart: a reload reads it, finds it good, and cannot put it in force.

House rules: one list, which the documentation is made from too; a key that is not in it takes effect at a reload.
"""

from __future__ import annotations

from dataclasses import fields

from powerd.config import Config, sections

#: What is only read when powerd starts: sections as a whole, and single keys.
AT_START = (
    "daemon.run_dir",
    "daemon.state_dir",
    "store",
    "metrics.enabled",
    "influx",
    "tcp.listen",
    "tcp.certificate",
    "tcp.key",
)


def waiting(running: Config, new: Config) -> list[str]:
    """The keys in which a new configuration differs from the one that powerd was started with, and that wait for a restart."""
    changed = [
        f"{section}.{f.name}"
        for section in sections()
        for f in fields(getattr(new, section))
        if getattr(getattr(new, section), f.name) != getattr(getattr(running, section), f.name)
    ]
    return [key for key in changed if key in AT_START or key.partition(".")[0] in AT_START]
