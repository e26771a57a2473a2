"""A powerd-hw on a simulated node, and the other end of its wire, for tests: waits for frames, never for time to pass."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from powerd.clock import NS, Clock, RealClock, SimClock
from powerd.hw import frames
from powerd.hw.frames import Command, Desired, Kind, Table
from powerd.hw.plan import BEAT, Order
from powerd.model import ClockPlan, Control, Interval, Outcome, Reading, Verdict
from powerd.sim import node as nodes
from powerd.sim.node import SimError
from powerd.sim.workload import Context

PATIENCE_S = 30.0
LIMIT, LOCK = Interval(400_000, 400_000), Interval(1200, 1200)


class Powerd:
    """What powerd is to powerd-hw: one connection with everything that came over it."""

    def __init__(self, link: socket.socket, clock: Clock) -> None:
        self.link, self.clock = link, clock
        self.link.settimeout(PATIENCE_S)
        self.seq = 0
        self.hello: Any = None
        self.tables: dict[Table, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.outcomes: list[Outcome] = []
        self.readings: tuple[Reading, ...] = ()
        self.plans: dict[int, dict[str, Any]] = {}  # number -> as last told; one that has ended stays
        self.armed: set[int] = set()  # of the newest table
        self.snapshots = 0
        self._reader = frames.TableReader()

    @classmethod
    def connect(cls, path: Path, clock: Clock | None = None) -> Powerd:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                link.connect(str(path))
                return cls(link, clock or RealClock())
            except OSError:
                link.close()
                if time.monotonic() > deadline:
                    raise
                threading.Event().wait(0.02)

    def greet(self) -> Powerd:
        for frame in frames.encode_table(Kind.HELLO, 0, 0, Table.HELLO, {"wire": frames.WIRE_VERSION}):
            self.send(frame)
        self.until(lambda: self.hello is not None)
        return self

    def send(self, frame: bytes) -> None:
        self.clock.flight(1)
        self.link.send(frame)

    def desire(self, *rows: tuple[str, Control, Interval | None], ttl_s: float = 600.0, dwell_ms: int = 1) -> int:
        self.seq += 1
        expiry_ns = self.clock.now_ns() + round(ttl_s * NS)
        table = [Desired(uuid, control, value, expiry_ns, dwell_ms) for uuid, control, value in rows]
        self.send(frames.encode_desired(self.seq, self.clock.now_ns(), table))
        return self.seq

    def ask_for_plan(self, plan: ClockPlan, number: int = 7, lease: str = "l1") -> Beater:
        """Send a plan with its beat socket; whether it is armed will be told."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        chunks = frames.encode_table(Kind.PLAN, 0, 0, Table.PLAN, Order(number, lease, plan).row())
        with theirs:
            for n, chunk in enumerate(chunks):
                self.clock.flight(1)
                socket.send_fds(self.link, [chunk], [theirs.fileno()] if n + 1 == len(chunks) else [])
        return Beater(ours, number, self.clock)

    def arm(self, plan: ClockPlan, number: int = 7) -> Beater:
        """A plan that powerd-hw has armed."""
        beater = self.ask_for_plan(plan, number)
        self.until(lambda: number in self.armed)
        return beater

    def disarm(self, number: int = 7) -> None:
        for frame in frames.encode_table(Kind.PLAN, 0, 0, Table.PLAN, {"do": "disarm", "number": number}):
            self.send(frame)

    def plan(self, number: int = 7, **fields: Any) -> dict[str, Any]:
        """The plan once it is told with these fields."""

        def find() -> dict[str, Any] | None:
            row = self.plans.get(number)
            return row if row is not None and all(row[name] == value for name, value in fields.items()) else None

        found = self.until(find)
        assert isinstance(found, dict)
        return found

    def command(self, command: Command, argument: int = 0) -> None:
        self.send(frames.encode_command(0, 0, command, argument))

    def take(self) -> bool:
        """One frame; False at the end of the connection."""
        try:
            frame = self.link.recv(frames.MAX_FRAME)
        except ConnectionResetError:
            return False
        if not frame:
            return False
        self.clock.flight(-1)
        head = frames.header(frame)
        if head.kind is Kind.SNAPSHOT:
            self.readings, self.snapshots = frames.decode_snapshot(frame), self.snapshots + 1
        elif head.kind is Kind.OUTCOME:
            self.outcomes += frames.decode_outcomes(frame)
        elif (whole := self._reader.feed(frame)) is not None:
            table, content = whole
            if table is Table.HELLO:
                self.hello = content
            elif table is Table.EVENT:
                self.events.append(content)
            elif table is Table.PLANS:
                self.armed = {row["number"] for row in content["rows"]}
                self.plans |= {row["number"]: row for row in [*content["rows"], *content["ended"]]}
            else:
                self.tables[table] = content
        return True

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never came; events {self.events[-5:]} outcomes {self.outcomes[-5:]}"
            assert self.take(), f"connection closed; hello {self.hello} events {self.events[-5:]}"
        return value

    def outcome(self, seq: int, uuid: str, control: Control, *verdicts: Verdict) -> Outcome:
        """The first outcome for this table and pair with one of these verdicts (default: any settled one)."""
        wanted = verdicts or tuple(v for v in Verdict if v is not Verdict.PENDING)

        def find() -> Outcome | None:
            return next(
                (o for o in self.outcomes if (o.seq, o.uuid, o.control) == (seq, uuid, control) and o.verdict in wanted), None
            )

        found = self.until(find)
        assert isinstance(found, Outcome)
        return found

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            return next(
                (e for e in self.events if e["kind"] == kind and all({**e, **e["data"]}.get(k) == v for k, v in fields.items())),
                None,
            )

        found = self.until(find)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        self.link.close()


class Beater:
    """The holder's end of a beat socket."""

    def __init__(self, link: socket.socket, number: int, clock: Clock) -> None:
        self.link, self.number, self.clock = link, number, clock
        self.link.settimeout(PATIENCE_S)

    def send(self, step: int, index: int) -> None:
        self.raw(BEAT.pack(self.number, step, index))

    def raw(self, message: bytes) -> None:
        self.clock.flight(1)
        try:
            self.link.send(message)
        except OSError:
            self.clock.flight(-1)
            raise

    def step(self, step: int, count: int) -> None:
        for index in range(count):
            self.send(step, index)

    def closed(self) -> bool:
        """Waits for powerd-hw to hang up."""
        try:
            return self.link.recv(1) == b""
        except ConnectionResetError:
            return True


class Rig:
    """A simulated node with a place for powerd-hw's files."""

    def __init__(self, tmp_path: Path, **node: Any) -> None:
        options: dict[str, Any] = {"gpus": 2, "latency": 0.1, "first_open_s": 0.0, **node}
        self.node = nodes.create(**options)
        self.clock: Clock = RealClock() if self.node.time == "real" else SimClock(self.node.load())
        self.uuids = [row["uuid"] for row in self.node.show()["gpus"]]
        self._short = Path(tempfile.mkdtemp(prefix="pdhw-"))
        self.socket = self._short / "hw.sock"
        self.journal = tmp_path / "journal"
        self.config_file = tmp_path / "powerd.toml"
        self.panic_file = tmp_path / "panic"
        self.configure()
        self.children: list[subprocess.Popen[str]] = []
        self._loads: list[Context] = []

    def configure(self, hw: str = "", extra: str = "", grace_s: float = 0.5, control: bool = True) -> None:
        places = f'journal_dir = "{self.journal}"\nrun_dir = "{self._short}"\n'
        daemon = f'[daemon]\ncontrol = {str(control).lower()}\npanic_file = "{self.panic_file}"\n'
        text = f"{daemon}[hw]\n{places}grace_s = {grace_s}\nmin_dwell_s = 0\n{hw}\n{extra}\n"
        self.config_file.write_text(text)
        self.config_file.chmod(0o600)

    def command(self, *arguments: str, kill_at: str | None = None, **environment: str) -> subprocess.Popen[str]:
        env = {**os.environ, **self.node.env(), **environment}
        if kill_at:
            env["POWERD_KILL_AT"] = kill_at
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", "powerd.hw", *arguments, "--config", str(self.config_file)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.children.append(child)
        return child

    def serve(self, *arguments: str, kill_at: str | None = None) -> subprocess.Popen[str]:
        return self.command("serve", *arguments, kill_at=kill_at)

    def connect(self) -> Powerd:
        """A greeted connection over which snapshots flow."""
        powerd = Powerd.connect(self.socket, self.clock).greet()
        powerd.until(lambda: powerd.readings)
        return powerd

    def restore(self, *arguments: str) -> tuple[int, str]:
        child = self.command("restore", *arguments)
        out, err = child.communicate(timeout=PATIENCE_S)
        return child.returncode, out + err

    def truth(self, gpu: int = 0) -> dict[str, Any]:
        row = self.node.show()["gpus"][gpu]
        assert isinstance(row, dict)
        return row

    def locked(self, mhz: int | None, gpu: int = 0) -> None:
        """Wait until the SM clock is pinned to this, or unlocked: no frame announces one beat."""
        wanted = None if mhz is None else [mhz, mhz]
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.truth(gpu)["locked_clocks_mhz"]) != wanted:
            assert time.monotonic() < deadline, f"{found}, not {wanted}"
            threading.Event().wait(0.002)

    def at_baseline(self) -> bool:
        rows = self.node.show()["gpus"]
        return all(row["locked_clocks_mhz"] is None and row["limit_mw"] == rows[0]["default_limit_mw"] for row in rows)

    @contextlib.contextmanager
    def load(self, gpu: int = 0, share: float = 0.2) -> Iterator[None]:
        """Light work, far below the power cap."""
        context, over = Context(gpu, node=self.node), threading.Event()

        def work() -> None:
            with contextlib.suppress(SimError):  # the driver was reloaded under it
                while not over.is_set():
                    context.load(share, 0.25)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # it must not outlive the node's memory
            context.close()

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with its worker
            child.communicate()
        self.node.close()
        shutil.rmtree(self._short, ignore_errors=True)


MakeRig = Callable[..., Rig]


def watts(value: int) -> Interval:
    return Interval(value * 1000, value * 1000)


def served(rig: Rig) -> Powerd:
    rig.serve()
    return rig.connect()


def truth_until(rig: Rig, condition: Callable[[], bool]) -> None:
    """For what no frame announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, rig.node.show()
        threading.Event().wait(0.01)
