"""Verbs around a command: run (a lease while it runs) and energy (what it used).

House rules: the command's signals and exit code pass through untouched; its stdout is its own, our lines go to stderr; the lease
ends with the command, whatever ends it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from powerd import units
from powerd.cli.context import (
    DryRun,
    GpuOption,
    Job,
    JsonFlag,
    MaxSmClock,
    MemClock,
    MinSmClock,
    PowerLimit,
    Reason,
    SmClock,
    Wants,
    connect,
    exit_code_of,
    note,
    simulated,
    split_gpus,
    tell_outcomes,
)
from powerd.cli.output import emit_json
from powerd.errors import EXIT_CONFLICT, EXIT_OK, PowerdError, RequestError, UnavailableError

if TYPE_CHECKING:
    from powerd.api import NodeView
    from powerd.client import Client, EnergyWindow

Command = Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command and its arguments.")]
OptionalCommand = Annotated[list[str] | None, typer.Argument(metavar="-- CMD...", help="The command and its arguments.")]
#: Options end where the command begins.
COMMAND_CONTEXT = {"allow_interspersed_args": False}
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


@contextlib.contextmanager
def _signals_held() -> Iterator[frozenset[signal.Signals]]:
    held = frozenset({*_PASSED_ON, signal.SIGCHLD})
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield held
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_command(command: list[str]) -> None:
    """Leave with 127 (126 when it may not be executed), as a shell does, before anything is set or measured for a command."""
    if shutil.which(command[0]) is None:
        there = os.path.exists(command[0]) and "/" in command[0]
        note(f"{command[0]}: it cannot be executed" if there else f"{command[0]}: command not found")
        raise typer.Exit(126 if there else 127)


def run_command(command: list[str]) -> int:
    """Run a command to its end with our signals passed on; its exit code, 128 + n when signal n ended it, 127 if not found."""
    with _signals_held() as held:
        try:
            pid = os.posix_spawnp(command[0], command, os.environ, setsigmask=(), setsigdef=_PASSED_ON)
        except FileNotFoundError:
            note(f"{command[0]}: command not found")
            return 127
        except OSError as error:
            note(f"{command[0]}: {error.strerror}")
            return 126
        while True:
            info = signal.sigtimedwait(held, 1.0)
            if info is None or info.si_signo == signal.SIGCHLD:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended = os.waitstatus_to_exitcode(code)
                    return ended if ended >= 0 else 128 - ended
            elif info.si_code <= 0:  # sent by a process; a terminal's own Ctrl-C has reached the command already
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, info.si_signo)


def run(
    ctx: typer.Context,
    command: Command,
    gpus: GpuOption = None,
    sm_clock: SmClock = None,
    min_sm_clock: MinSmClock = None,
    max_sm_clock: MaxSmClock = None,
    power_limit: PowerLimit = None,
    memory_clock: MemClock = None,
    reason: Reason = "",
    job: Job = None,
    ttl: Annotated[str | None, typer.Option("--ttl", metavar="TIME", help="TTL of the lease; renewed while it runs.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a command with clocks or a power limit set; undone when it ends, however it ends. Prints the energy it used."""
    wants = Wants.read(sm_clock, power_limit, memory_clock, min_sm_clock, max_sm_clock)
    if wants.empty:
        raise RequestError("nothing to set", hint="give --sm-clock or --power-limit, or use `powerctl energy -- CMD`")
    check_command(command)
    client = connect(ctx)
    node = client.node()
    lease = client.lease(
        split_gpus(gpus), **wants.keywords(), reason=reason or f"powerctl run {command[0]}", job=job, dry_run=dry_run,
        ttl_s=None if ttl is None else units.duration_s(ttl),
    )  # fmt: skip
    tell_outcomes(node, lease.view, load_follows=True)
    granted = exit_code_of(lease.view)
    if dry_run:
        label = f" ({simulated(node)})" if node.simulated else ""
        note(f"would run {' '.join(command)!r} on {len(lease.view.gpus)} GPU(s){label}; nothing was changed")
        raise typer.Exit(granted)
    with lease:
        window = _begin(client, list(lease.view.gpus), command[0], job)
        code = run_command(command)
        answered = _tell_energy(window, node)
        held = lease.held
        with contextlib.suppress(UnavailableError):  # the daemon is away: it sees our end when it is back
            lease.release(wait_s=10.0 if answered else 0.0)
    if not held:
        note(f"the lease was lost while the command ran: {lease.lost_reason}; its settings were undone early")
    raise typer.Exit(code or (EXIT_CONFLICT if not held else EXIT_OK if granted == EXIT_CONFLICT else granted))


def _begin(client: Client, gpus: list[str], name: str, job: str | None) -> EnergyWindow | None:
    """An energy window if the daemon grants one: the command runs in any case."""
    try:
        return client.energy(name, gpus, job=job).begin()
    except PowerdError as error:
        note(f"energy is not measured: {error}")
        return None


def _tell_energy(window: EnergyWindow | None, node: NodeView) -> bool:
    """Say what the command used; False when the daemon did not answer."""
    if window is None:
        return True
    try:
        window.end()
    except PowerdError as error:
        note(f"energy is not known: {error}")
        return not isinstance(error, UnavailableError)
    note(energy_line(window, node))
    return True


def energy_line(window: EnergyWindow, node: NodeView) -> str:
    """Energy, bounds, time and mean power in one line."""
    label = f" ({simulated(node)})" if node.simulated else ""
    count = f"{len(window.figures)} GPU{'s' if len(window.figures) != 1 else ''}"
    if window.energy_j is None:
        notes = "; ".join(sorted({f.note for f in window.figures if f.note})) or "no reading"
        return f"energy on {count} is not known: {notes}{label}"
    bounds = f" ({units.joules(window.low_j)} to {units.joules(window.high_j)})" if window.low_j is not None else ""
    power = f", {window.energy_j / window.duration_s:.1f} W" if window.duration_s else ""
    return f"{units.joules(window.energy_j)}{bounds} in {window.duration_s or 0:.2f} s{power} on {count}{label}"


def energy(
    ctx: typer.Context,
    command: OptionalCommand = None,
    gpus: GpuOption = None,
    duration: Annotated[str | None, typer.Option("--for", metavar="TIME", help="Measure this long instead, e.g. 10s.")] = None,
    job: Job = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure the energy of the GPUs while a command runs, or for a while."""
    if bool(command) == bool(duration):
        raise RequestError("measure what?", hint="give either -- CMD or --for 10s")
    wait_s = units.duration_s(duration) if duration else 0.0
    if command:
        check_command(command)
    client = connect(ctx)
    node = client.node()
    window = client.energy(command[0] if command else "powerctl energy", split_gpus(gpus), job=job)
    code = EXIT_OK
    window.begin()
    if command:
        code = run_command(command)
    else:
        _sleep(wait_s, node)
    window.end()
    if as_json:
        emit_json(window.view)
    elif command:
        note(energy_line(window, node))
    else:
        print(energy_line(window, node))
    raise typer.Exit(code)


def _sleep(seconds: float, node: NodeView) -> None:
    """In the node's own time; an early Ctrl-C ends the measurement, not its report."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(seconds / (node.time_scale or 1.0))
