"""`python -m benchmarks [names] [--json] [--write]`: measure, show, and on request rewrite results.md."""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.cases import CASES
from benchmarks.report import Report, bar, circumstances, write


def main(argv: list[str] | None = None) -> int:
    """Run the named benchmarks, or all; 0 when every one ran."""
    names = ", ".join(f"{name} ({' '.join((case.__doc__ or '').split()).rstrip('.')})" for name, case in CASES.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure powerd itself.", epilog=f"Names: {names}.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a benchmark")
    parser.add_argument("--write", action="store_true", help="rewrite their sections in benchmarks/results.md")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in CASES]:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(CASES)}")
    failed = 0
    for name in arguments.names or list(CASES):
        report = Report(name, name, simulated=False)
        if not arguments.json:
            told = circumstances(name)
            print(f"{name}: {told['command']}, {told['date']}, {told['machine']}", file=sys.stderr, flush=True)
        try:
            CASES[name](report, bar(name))
        except Exception as error:  # the others still run
            failed += 1
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            continue
        print(json.dumps(report.as_dict()) if arguments.json else report.markdown(), flush=True)
        if arguments.write:
            write([report])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
