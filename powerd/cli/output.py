"""Tables and JSON on stdout.

House rules: JSON is the API's own types, unchanged; tables are for eyes and keep their columns in a pipe; unknown is ``-``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from powerd import units
from powerd.cli.context import joined, simulated
from powerd.model import Health, Interval, reason_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from powerd.api import LeaseView, NodeView, PlanView, SnapshotView, WantSpec


#: Room for every column where no terminal bounds it; $COLUMNS describes a terminal, not a pipe.
PIPE_WIDTH = 240


def emit_json(value: Any) -> None:
    """One JSON document, indented, with a newline."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def console(*, stderr: bool = False) -> Console:
    """Where tables go: as wide as the terminal, and wide enough for all columns in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    # What is shown comes from users too: no text is markup.
    return Console(stderr=stderr, width=width, highlight=False, markup=False, soft_wrap=False)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr when somebody watches; it is told how much of how much is done."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column whose name starts with ``>`` is right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_style="bold")
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=True)
    return made


def interval(value: Interval | None, unit: str) -> str:
    """An interval for people: watts for mW, ``low-high`` unless both are equal."""
    if value is None:
        return "-"
    if unit == "mW":
        low, high, unit = value.low / 1000, value.high / 1000, "W"
    else:
        low, high = value.low, value.high
    return f"{high:g} {unit}" if low == high else f"{low:g}-{high:g} {unit}"


def want(spec: WantSpec) -> str:
    """What a lease wants for one control, such as ``sm_clock 1200 MHz`` or ``power_limit <= 300 W``."""
    factor, unit = (1000, "W") if spec.control.unit == "mW" else (1, spec.control.unit)
    low = None if spec.low is None else f"{spec.low / factor:g}"
    high = None if spec.high is None else f"{spec.high / factor:g}"
    if low == high:
        return f"{spec.control} {high} {unit}"
    if low is None:
        return f"{spec.control} <= {high} {unit}"
    return f"{spec.control} >= {low} {unit}" if high is None else f"{spec.control} {low}-{high} {unit}"


def plan(view: PlanView) -> str:
    """How a clock plan stands, such as ``p1 running at step 4, 3 of 8, cut to 1200 MHz``."""
    where = "" if view.step is None or view.index is None else f" at step {view.step}, {view.index + 1} of {view.instructions}"
    why = f" ({view.why})" if view.why else ""
    cut = "" if view.ceiling_mhz is None else f", cut to {view.ceiling_mhz} MHz"
    return f"{view.id} {view.state}{why}{where}{cut}"


def holder(lease: LeaseView, uuid: str) -> str:
    """Who holds this GPU with what, such as ``ada: sm_clock <= 1980 MHz; plan p1 running``."""
    plans = [f"plan {p.id} {p.state}" for p in lease.plans if p.uuid == uuid]
    return f"{lease.user}: {'; '.join([*map(want, lease.wants), *plans])}"


def node_line(node: NodeView) -> str:
    """One line that says what this node is and whether powerd may set anything."""
    mode = "control" if node.control else node.control_why or "monitor only"
    state = joined(
        ["PANIC" if node.panic else "", "quiesced" if node.quiesced else "", "" if node.hw_connected else "hw unit away"]
    )
    driver = f"driver {node.driver_version}" if node.driver_version else "no driver"
    return joined([f"{node.hostname}: powerd {node.version}", driver, simulated(node), mode, state])


def status_table(node: NodeView, snapshot: SnapshotView, leases: tuple[LeaseView, ...]) -> Table:
    """One row per GPU: what it does now and who holds it."""
    rows = table("GPU", "name", ">power", ">limit", ">SM clock", ">memory", ">temp", ">util", "clock events", "held by", "state",
                 title=node_line(node))  # fmt: skip
    for capability in node.gpus:
        gpu = capability.gpu
        r = next((r for r in snapshot.readings if r.uuid == gpu.uuid), None)
        holders = [holder(lease, gpu.uuid) for lease in leases if gpu.uuid in lease.gpus]
        if r is None:
            rows.add_row(str(gpu.index), gpu.name, *["-"] * 7, joined(holders) or "-", "not visible to you")
            continue
        events = ", ".join(n for n in reason_names(r.clock_event_reasons or 0) if n != "gpu_idle")
        limit = r.power_limit_enforced_mw if r.power_limit_enforced_mw is not None else r.power_limit_requested_mw
        rows.add_row(
            str(gpu.index), gpu.name, units.watts(r.power_mw), units.watts(limit), units.megahertz(r.sm_clock_mhz),
            units.megahertz(r.memory_clock_mhz), "-" if r.temperature_c is None else f"{r.temperature_c} C",
            "-" if r.utilization_percent is None else f"{r.utilization_percent} %", events or "-", joined(holders) or "-",
            "up" if r.health is Health.UP else str(r.health),
        )  # fmt: skip
    return rows
