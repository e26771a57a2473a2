"""A report as PDF pages: its tables as text, then its plots.

House rules: the words are those of the HTML page; a line that is too long goes on in the next; matplotlib writes the file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from powerd.cli.reports import words
from powerd.cli.reports.model import Report
from powerd.cli.reports.pictures import pictures, styled
from powerd.errors import RequestError
from powerd.plot import new_figure

_A4 = (8.27, 11.69)
_LINES = 62
_WIDTH = 92


def _lines(report: Report) -> Iterator[tuple[str, bool]]:
    """Every line of text and whether it is a heading."""
    for head, rows in (("Summary", words.summary(report)), ("Saving", words.saving(report)), ("Job", words.job(report))):
        if rows:
            yield head, True
            for name, text in rows:
                wrapped = textwrap.wrap(text, _WIDTH - 32) or [""]
                yield f"{name:<31} {wrapped[0]}", False
                yield from ((" " * 32 + more, False) for more in wrapped[1:])
            yield "", False
    yield "Nodes", True
    for row in words.nodes(report):
        yield from ((line, False) for line in textwrap.wrap("  ".join(row), _WIDTH, subsequent_indent="    "))
    yield "", False
    yield "Gaps", True
    for text in [f"{gap.where}: {gap.what}" for gap in report.gaps] or ["None."]:
        yield from ((line, False) for line in textwrap.wrap(text, _WIDTH, subsequent_indent="    "))


def write(report: Report, path: Path) -> None:
    """Write the file; RequestError when that cannot be done."""
    from matplotlib.backends.backend_pdf import PdfPages

    lines = list(_lines(report))
    title = f"{report.title}: energy report{' (simulated)' if report.simulated else ''}"
    try:
        with PdfPages(path, metadata={"Title": title, "Creator": f"powerd {report.powerd_version}", "CreationDate": None}) as out:
            for begin in range(0, len(lines), _LINES):
                figure = new_figure(*_A4)
                if begin == 0:
                    figure.text(0.08, 0.95, title, fontsize=15, parse_math=False)
                for row, (text, heading) in enumerate(lines[begin : begin + _LINES]):
                    weight = "bold" if heading else "normal"
                    figure.text(0.08, 0.92 - 0.0142 * row, text, fontsize=8, family="monospace", weight=weight, parse_math=False)
                out.savefig(figure)
            if shown := pictures(report):
                figure = new_figure(_A4[0], min(_A4[1], sum(p.height for p in shown) + 0.5))
                for axes, picture in zip(figure.subplots(len(shown), squeeze=False).flat, shown, strict=True):
                    picture.draw(axes, report)
                    styled(axes, picture.name, bool(report.simulated))
                out.savefig(figure)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from error
