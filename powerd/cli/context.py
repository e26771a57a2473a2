"""What every verb shares: the connection's options, the error line and the exit codes.

House rules: results go to stdout, everything else to stderr; the exit code is the one of powerd.errors; imports stay light,
because a shell prompt waits for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerd.errors import (
    EXIT_CONFLICT,
    EXIT_DENIED,
    EXIT_OK,
    EXIT_OVERRIDDEN,
    EXIT_TEMPFAIL,
    RequestError,
)
from powerd.model import Outcome, Verdict

if TYPE_CHECKING:
    from powerd.api import LeaseView, NodeView
    from powerd.client import Client

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable output (JSON, the API's own types).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
GpuNames = Annotated[list[str] | None, typer.Argument(metavar="[GPU]...", help="Index, UUID or unique UUID prefix; default all.")]
GpuOption = Annotated[
    str | None, typer.Option("--gpus", metavar="LIST", help="Indices or UUIDs, comma separated, or 'all'; default: visible ones.")
]
SmClock = Annotated[str | None, typer.Option("--sm-clock", metavar="MHZ", help="Lock the SM clock, e.g. 1200MHz or 1.2GHz.")]
MinSmClock = Annotated[str | None, typer.Option("--min-sm-clock", metavar="MHZ", help="SM clock no lower than this.")]
MaxSmClock = Annotated[str | None, typer.Option("--max-sm-clock", metavar="MHZ", help="SM clock no higher than this.")]
MemClock = Annotated[str | None, typer.Option("--memory-clock", metavar="MHZ", help="Lock the memory clock, e.g. 1593MHz.")]
PowerLimit = Annotated[str | None, typer.Option("--power-limit", metavar="W", help="Power limit, e.g. 300W.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; everybody who may see the GPU sees it.")]
Job = Annotated[str | None, typer.Option("--job", help="Job that this belongs to, e.g. a scheduler's id.")]


@dataclass(slots=True)
class Options:
    """How to reach the daemon."""

    socket: str | None = None
    url: str | None = None
    token_file: str | None = None
    timeout_s: float = 5.0


def connect(ctx: typer.Context) -> Client:
    """The client that this command line asks for."""
    from powerd.client import Client

    options = ctx.ensure_object(Options)
    return Client(options.socket, options.url, options.token_file, timeout_s=options.timeout_s)


def split_gpus(text: str | None) -> str | list[str]:
    """``--gpus`` as the client takes it."""
    if text is None or text in ("visible", "all"):
        return text or "visible"
    return [part for part in text.split(",") if part]


@dataclass(frozen=True, slots=True)
class Wants:
    """The controls of one command line in the client's units."""

    sm_clock_mhz: tuple[float | None, float | None] | None
    power_limit_w: float | None
    memory_clock_mhz: tuple[float | None, float | None] | None

    @classmethod
    def read(
        cls,
        sm_clock: str | None,
        power_limit: str | None,
        memory_clock: str | None,
        low: str | None = None,
        high: str | None = None,
    ) -> Wants:
        """Units checked, contradictions refused."""
        from powerd.units import clock_mhz, power_mw

        if sm_clock is not None and (low is not None or high is not None):
            raise RequestError("--sm-clock locks the clock to one value", hint="or give --min-sm-clock and --max-sm-clock")
        pair: tuple[float | None, float | None] | None = None
        if sm_clock is not None:
            pair = (clock_mhz(sm_clock), clock_mhz(sm_clock))
        elif low is not None or high is not None:
            pair = (None if low is None else clock_mhz(low), None if high is None else clock_mhz(high))
        memory = None if memory_clock is None else clock_mhz(memory_clock)
        return cls(
            pair, None if power_limit is None else power_mw(power_limit) / 1000, None if memory is None else (memory, memory)
        )

    @property
    def empty(self) -> bool:
        """Whether nothing is wanted."""
        return self.sm_clock_mhz is None and self.power_limit_w is None and self.memory_clock_mhz is None

    def keywords(self) -> dict[str, Any]:
        """As keyword arguments of ``Client.lease`` and ``Lease.change``."""
        return {
            "sm_clock_mhz": self.sm_clock_mhz, "power_limit_w": self.power_limit_w, "memory_clock_mhz": self.memory_clock_mhz,
        }  # fmt: skip


def note(message: str) -> None:
    """A line for the person at the terminal."""
    print(f"powerctl: {message}", file=sys.stderr)


def simulated(node: NodeView) -> str:
    """``simulated``, with its time scale, or nothing."""
    if not node.simulated:
        return ""
    if node.time_scale in (None, 1.0):
        return "simulated"
    return "simulated, stepped time" if node.time_scale == 0 else f"simulated, time x{node.time_scale:g}"


def exit_code_of(view: LeaseView) -> int:
    """What a lease's answer means for the shell: refused 4, overridden 3, failed 75 or 77, else 0 (also pending_load)."""
    if view.refused:
        return EXIT_CONFLICT
    verdicts = [o.verdict for o in view.outcomes]
    if Verdict.FAILED in verdicts:
        return EXIT_DENIED if any(o.nvml_code == 4 for o in view.outcomes if o.verdict is Verdict.FAILED) else EXIT_TEMPFAIL
    return EXIT_OVERRIDDEN if Verdict.OVERRIDDEN in verdicts else EXIT_OK


def tell_outcomes(node: NodeView, view: LeaseView, *, load_follows: bool = False) -> None:
    """One line on stderr per kind of thing that is not simply as wanted; with ``load_follows`` a clock that waits for load is."""
    index = {c.gpu.uuid: str(c.gpu.index) for c in node.gpus}
    said: dict[str, list[str]] = {}
    for refusal in view.refused:
        said.setdefault(f"{refusal.control}: not served: {refusal.why}", []).append(index.get(refusal.uuid, refusal.uuid))
    for outcome in view.outcomes:
        fine = outcome.verdict is Verdict.APPLIED or (load_follows and outcome.verdict is Verdict.PENDING_LOAD)
        if not fine:
            said.setdefault(f"{outcome.control}: {verdict_text(outcome)}", []).append(index.get(outcome.uuid, outcome.uuid))
    for text, gpus in said.items():
        note(f"GPU {', '.join(gpus)} {text}")


def verdict_text(outcome: Outcome) -> str:
    """A verdict in words, with what to expect next."""
    words = {
        Verdict.PENDING: "asked for, not confirmed yet",
        Verdict.PENDING_LOAD: "set; shows under load",
        Verdict.OVERRIDDEN: "set, but something overrides it",
        Verdict.FAILED: "the driver refused",
    }
    text = words.get(outcome.verdict, str(outcome.verdict))
    return f"{text} ({outcome.detail})" if outcome.detail else text


def begin_of(since: str, end_s: float) -> float:
    """``--since``: Unix seconds, or an age before the end; RequestError when it is neither, or not before the end."""
    from powerd.units import duration_s

    begin_s = float(since) if since.replace(".", "", 1).isdigit() else end_s - duration_s(since)
    if not 0 <= begin_s < end_s:
        raise RequestError(f"--since {since}: not before {end_s:.0f}", code="bad_value")
    return begin_s


def write_text(path: Path, text: str) -> None:
    """Write a result file; RequestError when that cannot be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from error


def joined(parts: Iterable[str]) -> str:
    """Parts that are not empty, separated for reading."""
    return ", ".join(part for part in parts if part)
