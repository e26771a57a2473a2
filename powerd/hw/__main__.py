"""``python -I -m powerd.hw``: the privileged unit's command line.

House rules: argparse, nothing from outside the standard library but pynvml; every refusal is one line that says what to do.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from powerd import clock as clocks
from powerd import config as configuration
from powerd.arguments import Parser
from powerd.errors import PowerdError


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="powerd-hw", description="Reads and sets GPUs for powerd; the only part with privilege.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="read GPUs, set what powerd asks for, restore in the end")
    serve.add_argument("--socket", type=Path, help="where powerd connects (default: from the configuration)")
    serve.add_argument(
        "--exit-with-peer", action="store_true", help="restore and exit when powerd has gone and its grace has ended"
    )
    serve.add_argument("--parent-fd", type=int, help="an open socket whose other end is powerd")
    restore = commands.add_parser("restore", help="bring every control that the journal names back to baseline, now")
    restore.add_argument(
        "--after-hand-over", action="store_true", help="wait for the hand-over mark to end; skip if one serves then"
    )
    hand_over = commands.add_parser("hand-over", help="keep settings for 10 s while a new version takes over")
    for command in (serve, restore, hand_over):
        command.add_argument("--config", type=Path, help="configuration file")
    worker = commands.add_parser("_worker")
    worker.add_argument("fd", type=int)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "_worker":
            from powerd.hw import worker

            return worker.main(arguments.fd)
        config = configuration.load(arguments.config)
        clock = clocks.from_environment()
        if arguments.command == "serve":
            from powerd.hw.supervisor import Supervisor

            supervisor = Supervisor(
                config, clock, path=arguments.socket, exit_with_peer=arguments.exit_with_peer,
                load=lambda: configuration.load(arguments.config),
            )  # fmt: skip
            parent = None if arguments.parent_fd is None else socket.socket(fileno=arguments.parent_fd)
            return int(clocks.run(clock, supervisor.run(parent)))
        from powerd.hw import restore

        if arguments.command == "hand-over":
            return restore.hand_over(config, clock, arguments.config)
        return restore.restore(config, clock, after_hand_over=arguments.after_hand_over)
    except PowerdError as error:
        print(f"powerd-hw: {error}", file=sys.stderr)
        return error.code.exit_code


if __name__ == "__main__":
    sys.exit(main())
