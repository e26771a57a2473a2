"""Keeps what a solver's C++ code prints out of a program's own output.

House rules: for programs, never for libraries: it moves a file descriptor of the whole process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Within, whatever is written to file descriptor 1 goes to 2 (HiGHS writes single lines whatever its log level is)."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
