"""``powerctl report``: energy, cost, carbon and the measured saving of a job or of a time, as HTML, PDF or JSON.

House rules: the kind of file is its name's ending; a node that is away makes a report with a gap, exit code 0; nothing is written
before all of it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli.context import Options, begin_of, note, write_text
from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.cli.reports.model import Factors, Report

KINDS = (".html", ".pdf", ".json")


def report(
    ctx: typer.Context,
    job: Annotated[str | None, typer.Option("--job", metavar="ID", help="This job, from its begin to its end.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="All GPUs since then: Unix seconds, or 15m, 24h, 7d; default 24h."),
    ] = None,
    nodes: Annotated[Path | None, typer.Option("--nodes", metavar="FILE", help="Ask every node in this TOML file.")] = None,
    prometheus: Annotated[
        str | None, typer.Option("--prometheus", metavar="URL", help="Ask this metrics server instead of nodes.")
    ] = None,
    price: Annotated[
        str | None, typer.Option("--price", metavar="PRICE", help="Such as 0.12/kWh or 0.12EUR/kWh; default: no cost is told.")
    ] = None,
    carbon: Annotated[
        str | None, typer.Option("--carbon", metavar="FACTOR", help="Such as 400g/kWh; default: no carbon is told.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="A .html, .pdf or .json file; default: JSON to stdout.")
    ] = None,
) -> None:
    """Write a report: energy over all nodes, cost, carbon, goodput, and the saving that was measured, with its uncertainty."""
    from powerd.cli.output import emit_json, progress
    from powerd.cli.reports import build

    kind = ".json" if out is None else out.suffix.lower()
    if kind not in KINDS:
        raise RequestError(f"{out}: a report ends in {', '.join(KINDS)}", code="bad_value")
    if kind != ".json":
        _need_matplotlib()
    if nodes is not None and prometheus is not None:
        raise RequestError("either --nodes or --prometheus")
    if job is not None and since is not None and prometheus is None:
        raise RequestError("a job's report covers the job: --since goes with --prometheus or without --job")
    from powerd.cli.reports.model import Factors

    amount, currency = build.price(price)
    factors = Factors(amount, currency, build.carbon(carbon))
    options = ctx.ensure_object(Options)
    with progress("asking") as told:
        made = _collected(options, job, since or "24h", nodes, prometheus, factors, told)
    if out is None:
        emit_json(made)
        return
    _write(made, out, kind)
    note(f"wrote {out}" + (" (simulated)" if made.simulated else ""))
    for gap in made.gaps:
        note(f"gap: {gap.where}: {gap.what}")


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError(
            "an HTML or PDF report needs matplotlib", hint="pip install 'powerd[plot]', or -o report.json", code="bad_value"
        ) from None


def _collected(
    options: Options,
    job: str | None,
    since: str,
    nodes: Path | None,
    prometheus: str | None,
    factors: Factors,
    told: Callable[[int, int], None],
) -> Report:
    from powerd.cli.reports import build
    from powerd.cli.reports import nodes as from_nodes
    from powerd.cli.reports import prometheus as from_prometheus

    now_s = time.time()
    if prometheus is not None:
        server = from_prometheus.Server.at(prometheus, options.token_file, max(30.0, options.timeout_s))
        found = from_prometheus.collect(server, job, begin_of(since, now_s), now_s, told)
    else:
        one = from_nodes.Endpoint("", options.socket, options.url, options.token_file)
        endpoints = (one,) if nodes is None else from_nodes.read_endpoints(nodes)
        found = from_nodes.collect(endpoints, job, lambda end_s: begin_of(since, end_s), options.timeout_s, told)
    data, begin_s, end_s = found
    return build.build(
        data, job=job, begin_s=begin_s, end_s=end_s, made_s=now_s, source="nodes" if prometheus is None else "prometheus",
        factors=factors,
    )  # fmt: skip


def _write(made: Report, out: Path, kind: str) -> None:
    if kind == ".json":
        import msgspec

        write_text(out, msgspec.json.format(msgspec.json.encode(made), indent=2).decode() + "\n")
    elif kind == ".html":
        from powerd.cli.reports.page import html

        write_text(out, html(made))
    else:
        from powerd.cli.reports.pdf import write

        write(made, out)
