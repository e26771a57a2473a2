"""powerctl: composition of the verbs, and the one place where errors become a line and an exit code.

House rules: no verb is registered by an import's side effect; usage errors are one line too; a broken pipe is not an error.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from powerd.cli import (
    dashboard,
    doctor,
    dynamollm,
    history,
    influx,
    jobs,
    lease,
    node,
    perseus,
    replicas,
    report,
    run,
    status,
    sweep,
)
from powerd.cli.context import Options, note
from powerd.errors import EXIT_FAILURE, EXIT_USAGE, PowerdError


def _version(value: bool) -> None:
    if value:
        from powerd import __version__

        print(f"powerctl {__version__}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    socket: Annotated[
        str | None, typer.Option("--socket", envvar="POWERD_SOCKET", help="The daemon's Unix socket; default: found by itself.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", envvar="POWERD_URL", help="https://HOST:PORT instead of a socket.")] = None,
    token_file: Annotated[
        str | None, typer.Option("--token-file", envvar="POWERD_TOKEN_FILE", help="File with the token for --url.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 5.0,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Measure and set GPU clocks and power limits through powerd."""
    ctx.obj = Options(None if url else socket, url, token_file, timeout_s)


def build() -> typer.Typer:
    """All verbs as one typer app."""
    app = typer.Typer(
        name="powerctl", add_completion=True, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.callback()(_root)
    app.command("status")(status.status)
    app.command("top")(status.top)
    app.command("set", no_args_is_help=True)(lease.set_)
    app.add_typer(lease.lease_app, name="lease")
    app.command("run", context_settings=run.COMMAND_CONTEXT, no_args_is_help=True)(run.run)
    app.command("energy", context_settings=run.COMMAND_CONTEXT)(run.energy)
    app.command("explain", no_args_is_help=True)(status.explain)
    app.command("history")(history.history)
    app.command("events")(history.events)
    app.command("jobs")(jobs.jobs)
    app.command("replicas")(replicas.replicas)
    app.command("dashboard")(dashboard.dashboard)
    app.command("report")(report.report)
    app.command("sweep", context_settings=run.COMMAND_CONTEXT, no_args_is_help=True)(sweep.sweep)
    app.add_typer(perseus.perseus_app, name="perseus")
    app.add_typer(dynamollm.app, name="dynamollm")
    app.add_typer(influx.app, name="influx")
    app.command("panic")(node.panic)
    app.command("quiesce")(node.quiesce)
    app.command("resume")(node.resume)
    app.command("doctor")(doctor.doctor)
    try:
        service = importlib.import_module("powerd.cli.service")
    except ModuleNotFoundError as error:
        if error.name != "powerd.cli.service":
            raise
    else:
        app.add_typer(service.app, name="service")
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run powerctl and leave with its exit code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    from typer import exceptions

    try:
        result = build()(args=arguments, prog_name="powerctl", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except PowerdError as error:
        note(" ".join(str(error).split()))
        return error.code.exit_code
    except exceptions.TyperException as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _usage(error: Exception) -> int:
    message = getattr(error, "format_message", lambda: str(error))()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return EXIT_USAGE
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "powerctl")
    note(f"{' '.join(message.split())} (see `{path} --help`)")
    return int(getattr(error, "exit_code", EXIT_FAILURE))


if __name__ == "__main__":
    main()
