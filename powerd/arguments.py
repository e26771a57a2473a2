"""The command line parser of `powerd`, `powerd sim` and `powerd-hw`.

House rules: standard library only, because the privileged side uses it; a mistake is one line that says where help is.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from powerd.errors import EXIT_USAGE


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, without the page of usage before it; its subparsers do too."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see `{self.prog} --help`)\n")
