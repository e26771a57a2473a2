"""`powerctl dashboard`: the built-in page in a browser, on this machine only, as the user who asks.

House rules: it only reads; the link is good once; the token is never on a command line, where others could see it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from powerd.cli.context import connect, note
from powerd.errors import RequestError
from powerd.resources import folder


def dashboard(
    ctx: typer.Context,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0: a free one.")] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser; print the link.")] = False,
    print_url: Annotated[bool, typer.Option("--print-url", help="Print the link alone, for scripts; open no browser.")] = False,
) -> None:
    """Show GPUs, leases, jobs and history in a browser, as you may see them; Ctrl-C ends it.

    The page only reads. Its link works once, on this machine: `ssh -L 8080:127.0.0.1:PORT NODE` brings it elsewhere.
    """
    from powerd.cli.webserver import Dashboard

    client = connect(ctx)
    node = client.node()  # no daemon: say so here, not in the browser
    try:
        server = Dashboard(port, folder("dashboards") / "web", client.transport)
    except OSError as error:
        raise RequestError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}", hint="take another --port") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place: Path | None = None
    try:
        if print_url:
            print(server.url, flush=True)
        else:
            print(f"{node.hostname}: {server.url}\nThe link works once. Ctrl-C ends the page.", flush=True)
        if not (print_url or no_open):
            place = Path(tempfile.mkdtemp(prefix="powerd-"))  # ours alone
            server.gate.on_used = lambda: shutil.rmtree(place, ignore_errors=True)
            _open(place, server.url)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _open(place: Path, url: str) -> None:
    """Open a browser by a file that only this user can read: its command line shows the file's name, not the token."""
    page = place / "open.html"
    with os.fdopen(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={url}"><a href="{url}">powerd</a>')
    if not webbrowser.open(page.as_uri()):
        note("no browser was found: open the link in one")
