"""``powerd``: the daemon's command line and its composition, readable from top to bottom.

House rules: nothing registers itself; every refusal is one line that says what to do, with the exit code of powerd.errors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerd import __version__
from powerd import clock as clocks
from powerd import config as configuration
from powerd.access import Rules
from powerd.api import LeaseView, NodeView
from powerd.arguments import Parser
from powerd.clock import Clock
from powerd.config import Config
from powerd.errors import EXIT_OK, EXIT_UNAVAILABLE, ConfigError, PowerdError, UnavailableError
from powerd.model import Event
from powerd.sinks.influxsetup import check_influx, make_sink
from powerd.tcp import check_tcp


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="powerd", description="Measures and sets GPU clocks and power limits on this node.")
    parser.add_argument("--version", action="version", version=f"powerd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the daemon")
    run.add_argument("--config", type=Path, metavar="FILE", help="configuration file")
    run.add_argument(
        "--hw-socket", type=Path, metavar="PATH", help="connect to this powerd-hw instead of starting one as a child"
    )
    run.add_argument("--state-dir", metavar="DIR", help="daemon.state_dir")
    run.add_argument("--run-dir", metavar="DIR", help="daemon.run_dir")
    run.add_argument("--control", action="store_true", help="daemon.control = true: leases may set clocks and limits")
    run.add_argument("--require-gpu", action="store_true", help="exit 69 when no GPU can be read")
    check = commands.add_parser("check-config", help="check a configuration file")
    check.add_argument("file", nargs="?", type=Path, help="default: the file that run would read")
    for name, text in (
        ("hw", "the privileged unit: powerd hw serve|restore|hand-over"),
        ("restore", "bring every control that the journal names back to baseline"),
        ("sim", "the simulated driver: powerd sim run|engine|fault|show"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["hw"]:
            return _exec_hw(words[1:])
        if words[:1] == ["restore"]:
            return _exec_hw(words)
        if words[:1] == ["sim"]:
            return _sim(words[1:])
        arguments = _parser().parse_args(words)
        if arguments.command == "check-config":
            config = configuration.load(arguments.file)
            check_tcp(config.tcp)
            check_influx(config.influx)
            _check_replicas(config)
            print(f"{arguments.file or configuration.default_file()}: good")
            return EXIT_OK
        return _run(arguments)
    except PowerdError as error:
        print(f"powerd: {error}", file=sys.stderr)
        return error.code.exit_code
    except KeyboardInterrupt:
        return 130


def _exec_hw(words: list[str]) -> int:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-I", "-m", "powerd.hw", *words])  # noqa: S606


def _sim(words: list[str]) -> int:
    try:
        from powerd.sim import cli
    except ImportError as error:
        raise UnavailableError(f"the simulated driver is not installed: {error}", hint="pip install 'powerd[sim]'") from error
    return int(cli.main(words) or 0)


def load_config(arguments: argparse.Namespace) -> Config:
    """The configuration file with the command line laid over it. ConfigError when refused."""
    config = configuration.load(arguments.config)
    changes: dict[str, Any] = {}
    if arguments.run_dir:
        changes["run_dir"] = arguments.run_dir
    if arguments.state_dir:
        changes["state_dir"] = arguments.state_dir
    if arguments.control:
        changes["control"] = True
    return replace(config, daemon=replace(config.daemon, **changes))


def for_child(config: Config, state_dir: Path) -> Config:
    """The configuration of a powerd-hw that is our child: its journal is beside our own state unless it has a place."""
    return replace(config, hw=replace(config.hw, journal_dir=config.hw.journal_dir or str(state_dir / "hw")))


def _run(arguments: argparse.Namespace) -> int:
    try:
        import aiohttp  # noqa: F401
        import msgspec  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"the daemon needs {error.name}", hint="pip install 'powerd[daemon]'") from error
    config = load_config(arguments)
    clock = clocks.from_environment()
    return int(clocks.run(clock, serve(arguments, config, clock)))


async def serve(arguments: argparse.Namespace, config: Config, clock: Clock) -> int:
    """The daemon from start to end: what there is, who knows whom, and in which order it comes and goes."""
    from powerd.atstart import waiting
    from powerd.attach import AttachServer
    from powerd.engine import Engine
    from powerd.events import EventLog
    from powerd.handlers import Handlers
    from powerd.hostcontext import HostContext
    from powerd.hostroutes import HostRoutes
    from powerd.hwchild import HwChild
    from powerd.hwlink import HwLink
    from powerd.jobroutes import JobRoutes
    from powerd.jobs import JobTable
    from powerd.leasebook import LeaseBook
    from powerd.leasefile import LeaseFile
    from powerd.log import log
    from powerd.node import Node, alive
    from powerd.notify import listen_sockets, notify, watchdog_ns
    from powerd.peer import group_id
    from powerd.planroutes import PlanRoutes
    from powerd.replicacheck import check_replicas
    from powerd.replicaroutes import ReplicaRoutes
    from powerd.replicas import Replicas
    from powerd.server import Server
    from powerd.sinks.metrics import Metrics
    from powerd.sinks.store import Store
    from powerd.sockets import bind, lock_state, make_dir
    from powerd.solver_child import Solver
    from powerd.sse import Hub
    from powerd.trace import EnergySpans
    from powerd.views import lease_view, node_view
    from powerd.windows import EnergyWindows

    run_dir, state_dir = configuration.run_dir(config), configuration.state_dir(config)
    make_dir(run_dir, 0o755)
    make_dir(state_dir, 0o700)
    tcp_tokens = check_tcp(config.tcp)
    check_replicas(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_state(state_dir))
        handed = listen_sockets()
        api_socket = handed.get("api") or stack.enter_context(bind(run_dir / "powerd.sock"))
        attach_socket = handed.get("attach") or stack.enter_context(bind(run_dir / "attach.sock", seqpacket=True))

        # What is known
        events = EventLog(clock)
        node = Node(clock, config.hw.sample_hz)
        book = LeaseBook(clock, LeaseFile(state_dir / "leases.json"), events)
        engine = Engine(clock, config, book, events, node)
        replicas = Replicas(engine, state_dir / "replicas.json")
        reload_error = ""
        started_wall_ns = clock.wall_ns()

        # Who listens to samples and events
        windows = EnergyWindows(clock, round(clocks.NS / config.hw.sample_hz))
        metrics = Metrics() if config.metrics.enabled else None
        store = Store(state_dir / "history.sqlite", config.store, clock) if config.store.enabled else None
        influx = make_sink(config.influx, state_dir, clock, platform.node(), config.hw.sample_hz, _from_thread(events.add))
        spans = EnergySpans(clock, round(clocks.NS / config.hw.sample_hz))
        jobs = JobTable()
        host = HostContext(lambda: node.host_energy_uj)
        node.listeners.append(windows.observe)
        node.listeners.append(spans.observe)
        node.listeners.append(host.observe)
        if metrics is not None:
            node.listeners.append(metrics.observe)
            events.listeners.append(lambda event: _count(metrics, event))
            engine.setpoints.on_set = metrics.was_set
        if store is not None:
            node.listeners.append(store.append)
            jobs.listeners.append(store.append_job)
            host.listeners.append(store.append_load)
            events.listeners.append(store.append_event)
        if influx is not None:
            node.listeners.append(influx.append)
            jobs.listeners.append(influx.append_job)
            events.listeners.append(influx.append_event)
            replicas.on_row = influx.append_inference

        # Who asks
        def rules() -> Rules:
            access = engine.config.access
            group = group_id(access.group) if access.group else None
            return Rules(os.geteuid(), group, access.open_reads, engine.config.tcp.loopback_reads)

        def show_node() -> NodeView:
            scale = clock.scale if clock.simulated else None
            return node_view(
                engine, time_scale=scale, started_wall_ns=started_wall_ns, reload_ok=not reload_error, reload_error=reload_error
            )

        attach = AttachServer(engine, attach_socket, rules, alive)

        def on_lease(lease: Any) -> None:
            engine.plans.lease_changed(lease)
            attach.lease_changed(lease)
            replicas.lease_changed(lease)
            view: LeaseView = lease_view(engine, lease)
            for sink in (store, influx):
                if sink is not None:
                    sink.append_lease(view)

        book.on_lease = on_lease
        engine.plans.on_plan = attach.plan_changed
        hub = Hub(clock, node, events)
        handlers = Handlers(engine, hub, attach, show_node, windows, metrics, store)
        handlers.influx = influx
        solver = Solver(clock)
        job_routes = JobRoutes(handlers, spans, jobs, solver)
        host_routes = HostRoutes(handlers, host)
        replica_routes = ReplicaRoutes(handlers, replicas)
        handlers.counts += [job_routes.count, host_routes.count, replica_routes.count]
        tables = [x.table() for x in (handlers, PlanRoutes(handlers), job_routes, host_routes, replica_routes)]
        server = Server(clock, {name: handler for table in tables for name, handler in table.items()}, rules, lambda: tcp_tokens)

        # powerd-hw
        hw_socket = arguments.hw_socket or (run_dir / "hw" / "hw.sock")
        link = HwLink(hw_socket, clock, engine)
        engine.hw = engine.plans.hw = link
        child = None
        if not arguments.hw_socket:
            make_dir(hw_socket.parent, 0o700)
            child = HwChild(hw_socket, for_child(config, state_dir))

        def reload() -> None:
            nonlocal reload_error, tcp_tokens
            notify("RELOADING=1", f"MONOTONIC_USEC={clocks.RealClock().now_ns() // 1000}")
            try:
                new = load_config(arguments)
                tcp_tokens = check_tcp(new.tcp)
                check_influx(new.influx)
                check_replicas(new)
                if child is not None:
                    child.reload(for_child(new, state_dir))
                engine.apply_config(new)
                node.sample_hz = new.hw.sample_hz
                windows.sampled_every(round(clocks.NS / new.hw.sample_hz))
                spans.sampled_every(round(clocks.NS / new.hw.sample_hz))
                reload_error = ""
                waits = waiting(config, new)
                events.add("config_reloaded", detail=f"takes effect at the next start: {', '.join(waits)}" if waits else "")
                replicas.apply_config()
            except ConfigError as error:
                reload_error = str(error)
                events.add("config_refused", detail=str(error))
            notify("READY=1")

        async def feed_watchdog(period_s: float) -> None:
            seen = -1
            while True:
                if engine.progress != seen:
                    seen = engine.progress
                    notify("WATCHDOG=1")
                await asyncio.sleep(period_s)

        # Go
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload)
        engine.start()
        replicas.start()
        if store is not None:
            await _load_jobs(jobs, store, clock)
        attach.start()
        await server.start(api_socket, config.tcp)
        work: list[Coroutine[Any, Any, None]] = [engine.run(), link.run(), replicas.run()]
        if child is not None:
            work.append(child.run())
        if (period_ns := watchdog_ns()) is not None:
            work.append(feed_watchdog(clocks.seconds(period_ns)))
        tasks = [asyncio.create_task(w) for w in work]
        tasks.append(asyncio.create_task(stop.wait()))  # type: ignore[arg-type]
        code = EXIT_OK
        try:
            what = "control" if config.daemon.control else "monitor only"
            log("started", version=__version__, socket=run_dir / "powerd.sock", mode=what, simulated=clock.simulated)
            if metrics is not None:
                metrics.build(__version__, clock.simulated)
            notify("READY=1", f"STATUS={what}")
            if arguments.require_gpu and not await _has_gpu(node, clock):
                raise UnavailableError("no GPU can be read on this node", hint="nvidia-smi should list one; see powerctl doctor")
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None:
                    log("task_failed", why=repr(error))
                    raise error
            code = EXIT_OK if stop.is_set() else EXIT_UNAVAILABLE
        finally:
            notify("STOPPING=1")
            engine.stop(restore=child is not None)
            attach.stop()
            solver.stop()
            await server.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if child is not None:
                await child.stop()
            await asyncio.gather(*(asyncio.to_thread(sink.close) for sink in (store, influx) if sink is not None))
            log("stopped")
        return code


def _check_replicas(config: Config) -> None:
    """The replicas of the file, where the daemon is installed; without it there is nothing that could follow them."""
    if config.replica:
        from powerd.replicacheck import check_replicas

        check_replicas(config)


def _from_thread(add: Callable[..., Event]) -> Callable[[str, str], None]:
    """Add events from another thread; nobody waits, and after the loop's end nobody hears."""
    loop = asyncio.get_running_loop()

    def tell(kind: str, detail: str) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: add(kind, detail=detail))

    return tell


def _count(metrics: Any, event: Event) -> None:
    if event.kind == "drift":
        metrics.drift(event.subject or "")
    elif event.kind == "restored":
        metrics.restored(str(event.data.get("cause") or ""))


async def _load_jobs(jobs: Any, store: Any, clock: Clock) -> None:
    """What an earlier daemon stored of jobs; a store that cannot be read is its own trouble."""
    with clocks.standing(clock), contextlib.suppress(UnavailableError):
        rows, steps = await asyncio.to_thread(store.jobs)
        jobs.load(rows, steps, clock.now_ns(), clock.wall_ns())


async def _has_gpu(node: Any, clock: Clock, wait_s: float = 10.0) -> bool:
    deadline_ns = clock.now_ns() + clocks.from_seconds(wait_s)
    while not node.capabilities and clock.now_ns() < deadline_ns:
        await asyncio.sleep(0.1)
    return bool(node.capabilities)


if __name__ == "__main__":
    sys.exit(main())
