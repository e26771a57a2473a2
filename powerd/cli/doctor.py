"""The verb doctor: one look at everything that must be right.

House rules: it works without a daemon; the exit code is 0 only when no finding is a problem; findings carry their remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from powerd.cli.context import JsonFlag, connect
from powerd.cli.output import console, emit_json, table
from powerd.errors import EXIT_FAILURE, EXIT_OK, EXIT_UNAVAILABLE, PowerdError


def doctor(
    ctx: typer.Context,
    post_stop: Annotated[
        bool, typer.Option("--post-stop", help="After stopping powerd: prove that it left nothing behind.")
    ] = False,
    journal_dir: Annotated[
        Path | None,
        typer.Option("--journal-dir", help="With --post-stop: where powerd-hw kept its journal; default: as installed."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check driver, permission, persistence, daemon, hw unit and other programs that set GPUs."""
    from powerd.cli import checks

    code = EXIT_OK
    if post_stop:
        from powerd import config

        loaded = config.load()
        findings = checks.after_stop(config.run_dir(loaded), journal_dir or config.journal_dir(loaded))
    else:
        findings = checks.driver()
        try:
            findings += checks.node(connect(ctx).node())
        except PowerdError as error:
            code = error.code.exit_code or EXIT_UNAVAILABLE
            findings.append(checks.Finding("daemon", checks.Level.PROBLEM, error.message, error.hint))
        findings += checks.managers()
    if as_json:
        emit_json(findings)
    else:
        from rich.text import Text

        rows = table("", "check", "finding", "what to do")
        for column in rows.columns[2:]:
            column.no_wrap = False
        for f in findings:
            style = {checks.Level.OK: "green", checks.Level.NOTE: "yellow", checks.Level.PROBLEM: "red"}[f.level]
            rows.add_row(Text(f.level, style=style), f.check, f.text, f.remedy)
        console().print(rows)
    if code == EXIT_OK and any(f.level is checks.Level.PROBLEM for f in findings):
        code = EXIT_FAILURE
    raise typer.Exit(code)
