"""Writes the dashboards: ``python -m dashboards.grafana``; a test compares the files with what this makes."""

from __future__ import annotations

from pathlib import Path

from dashboards.grafana import influx, prometheus
from dashboards.grafana.parts import text

HERE = Path(__file__).parent


def documents() -> dict[str, str]:
    """File name -> text, for every dashboard."""
    return {"powerd-prometheus.json": text(prometheus.document()), "powerd-influx.json": text(influx.document())}


if __name__ == "__main__":
    for name, content in documents().items():
        (HERE / name).write_text(content, encoding="utf-8")
        print(HERE / name)
