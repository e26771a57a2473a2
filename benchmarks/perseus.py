"""`python -m benchmarks.perseus` (`make bench-perseus`): everything measured about Perseus, one after the other.

House rules: each part is a command of its own as well; all of them run, whatever one of them says.
"""

from __future__ import annotations

import sys

from benchmarks import perseus_replay, perseus_rows, perseus_speed
from benchmarks.report import run

PARTS = {"perseus-rows": perseus_rows, "perseus-speed": perseus_speed, "perseus-replay": perseus_replay}


def main(argv: list[str] | None = None) -> int:
    """Run the parts with --json or --write as given; 0 when every promise is kept."""
    failed = []
    for name, part in PARTS.items():
        try:
            if run(name, f"python -m benchmarks.{name.replace('-', '_')}", part.measure, argv):
                failed.append(name)
        except Exception as error:  # the others still run
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    for name in failed:
        print(f"{name}: failed, or a promise is not kept", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
