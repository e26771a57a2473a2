"""A report as one HTML file that needs nothing else: no script, no font, no network; dark or light as the reader's system is.

House rules: every text from outside is escaped; tables have captions and heads with scopes; a plot says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from powerd.cli.reports import words
from powerd.cli.reports.counters import clock_text
from powerd.cli.reports.model import Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --paper: #fdfdfc; --line: #d7dade; --quiet: #5a626b; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #15181c; --line: #363c44; --quiet: #a4acb5; --warn: #f0b060; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.quiet, footer { color: var(--quiet); font-size: .9rem; }
.mark { border: 1px solid var(--warn); color: var(--warn); border-radius: .3rem; padding: .05rem .45rem; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); font-size: .9rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; font-weight: normal; }
thead th { color: var(--quiet); font-size: .85rem; } tbody th { color: var(--quiet); white-space: nowrap; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; } figcaption { color: var(--quiet); font-size: .9rem; }
ul { padding-left: 1.2rem; }
@media print { body { max-width: none; } }
"""  # noqa: E501 (a style sheet)


def _pairs(caption: str, rows: Sequence[words.Row]) -> str:
    body = "\n".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<div class="scroll"><table><caption>{escape(caption)}</caption><tbody>\n{body}\n</tbody></table></div>'


def _grid(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def html(report: Report) -> str:
    """The whole page."""
    from powerd.cli.reports.pictures import all_svg

    mark = ' <span class="mark">simulated</span>' if report.simulated else ""
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}: energy report</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{escape(report.title)}{mark}</h1>",
        '<p class="quiet">Energy report. A figure stands with the interval in which the true value lies with 95 % confidence; '
        "a saving with its own.</p></header><main>",
        "<h2>Summary</h2>", _pairs("What it used and what was saved", words.summary(report)),
    ]  # fmt: skip
    for picture, drawn in all_svg(report):
        svg = drawn.replace("<svg", f'<svg role="img" aria-label="{escape(picture.text)}"', 1)
        parts.append(f"<figure>{svg}<figcaption>{escape(picture.text)}</figcaption></figure>")
    if rows := words.saving(report):
        parts += ["<h2>Saving</h2>", _pairs("How it was found and what it comes to", rows)]
    if rows := words.job(report):
        parts += ["<h2>Job</h2>", _pairs("As the job reported itself, all nodes together", rows)]
    parts += ["<h2>Nodes</h2>", _grid("Energy of every GPU", words.NODES_HEAD, words.nodes(report))]
    gaps = "".join(f"<li>{escape(gap.where)}: {escape(gap.what)}</li>" for gap in report.gaps)
    parts += ["<h2>Gaps</h2>", f"<ul>{gaps}</ul>" if gaps else "<p>None.</p>", "</main>"]
    parts.append(f"<footer><p>powerd {escape(report.powerd_version)}, {clock_text(report.made_s)} UTC, "
                 f"from {escape(report.source)}, schema {report.schema}.</p></footer></body></html>")  # fmt: skip
    return "\n".join(parts) + "\n"
