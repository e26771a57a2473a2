"""One plan, for a caller that must not load a solver itself: JSON in, JSON out, then gone.

House rules: stdout holds one JSON document and nothing else; bad input is exit code 2 and ``{"error": ...}``; no file is read.

Input: ``{"job": {...}, "profile_rows": [{"stage", "instruction", "frequency", "time", "energy"}, ...], "deadline": "1.05x"}``,
the job as in JOB.json without ``profile``. Output: OUT.json.
"""

from __future__ import annotations

import json
import sys

from powerd.errors import EXIT_FAILURE, EXIT_USAGE, PowerdError
from powerd_policies.perseus import solve
from powerd_policies.perseus.quiet import stdout_to_stderr


def main() -> int:
    """Read stdin, write stdout; the exit code."""
    try:
        with stdout_to_stderr():
            made, code = solve.answer(json.load(sys.stdin)), 0
    except PowerdError as error:
        made, code = {"error": str(error)}, EXIT_USAGE
    except ValueError as error:
        made, code = {"error": f"the request is not JSON: {error}"}, EXIT_USAGE
    except MemoryError:
        made, code = {"error": "the plan needs more memory than there is"}, EXIT_FAILURE
    json.dump(made, sys.stdout)
    print()
    return code


if __name__ == "__main__":
    sys.exit(main())
