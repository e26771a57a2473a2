"""A simulated node with powerd's two units, watched over as systemd does it, and a second process that reads NVML.

House rules: what is found is read through NVML by a process that is not powerd; a unit that dies is restarted without the kill
point, powerd-hw after its restore, as its unit file says; every process that is started here is ended here, by its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from powerd.client import Client
from powerd.errors import PowerdError
from powerd.sim import node as sim_node

GRACE_S = 1.0
#: What must hold this long after a death, in seconds: the times that docs/hardware-control.md states.
CLIENT_DEADLINE_S = 0.25
POWERD_DEADLINE_S = GRACE_S + 0.5
HW_DEADLINE_S = 2.0
BASELINE = (700_000, 1980)  # H100 SXM: default limit in mW; SM clock under a small load, unlocked

_CONFIG = """
[daemon]
control = true
run_dir = "{root}/run"
state_dir = "{root}/state"
panic_file = "{root}/panic"
reattach_s = {grace}
[hw]
run_dir = "{root}/hw"
journal_dir = "{root}/journal"
grace_s = {grace}
min_dwell_s = 0
"""

_READER = """
import sys, time
import pynvml as n
n.nvmlInit()
h = n.nvmlDeviceGetHandleByIndex(0)
for line in sys.stdin:
    clocks = sorted(n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM) for _ in range(3))
    print(n.nvmlDeviceGetPowerManagementLimit(h), clocks[1], flush=True)
"""

_CLIENT = """
import sys, time
from powerd.client import Client
from powerd.model import ClockPlan
client = Client(sys.argv[1])
lease = client.lease("all", sm_clock_mhz=1200, power_limit_w=500, reason="kill campaign", ttl_s=30)
print("granted", flush=True)
lease.change(sm_clock_mhz=(None, 1305), power_limit_w=450)
print("changed", flush=True)
plan = ClockPlan("kill", lease.view.gpus[0], (1305, 1005, 900), 1110, 60.0)
with lease.arm(plan) as beats:
    for number in range(6):
        beats.send(*divmod(number, 3))
        time.sleep(0.02)
    lease.arm(plan).send(0, 0)
sys.stdin.readline()
lease.release()
print("released", flush=True)
"""
#: (power limit in mW, SM clock in MHz) that the client above may have put in force, one control at a time.
LIVE_LIMITS, LIVE_CLOCKS = {500_000, 450_000}, {1200, 1305, 1110, 1005, 900}


class BrokenPromiseError(AssertionError):
    """Something that a user would call a broken promise."""


def wait_for(what: str, test: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Poll a condition of other processes; returns the seconds it took; BrokenPromiseError when it does not come."""
    begin = time.monotonic()
    while not test():
        if time.monotonic() - begin > timeout_s:
            raise BrokenPromiseError(f"{what}: not within {timeout_s:g} s")
        threading.Event().wait(0.005)
    return time.monotonic() - begin


@dataclass
class Unit:
    """One process under the rig's care."""

    name: str
    argv: list[str]
    process: subprocess.Popen[str] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Rig:
    """The node, its units and the reader."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pd"))
        self.node = sim_node.create("h100-sxm", gpus=1, time="real", seed=7)
        self.config = self.root / "powerd.toml"
        self.config.write_text(_CONFIG.format(root=self.root, grace=GRACE_S))
        self.env = {**os.environ, **self.node.env()}
        for name in ("POWERD_KILL_AT", "POWERD_KILL_ONCE", "POWERD_SOCKET"):
            self.env.pop(name, None)
        self.socket = self.root / "run" / "powerd.sock"
        python = [sys.executable, "-I", "-m"]
        hw = [*python, "powerd.hw", "serve", "--config", str(self.config)]
        daemon = [*python, "powerd.main", "run", "--config", str(self.config), "--hw-socket", str(self.root / "hw" / "hw.sock")]
        self.units = {"hw": Unit("hw", hw), "powerd": Unit("powerd", daemon)}
        self.log = (self.root / "log").open("a")
        load = [sys.executable, "-m", "powerd.sim.workload", "--load", "0.1", "--seconds", "1e6"]
        self.load = subprocess.Popen(load, env=self.env, stdout=self.log, stderr=self.log)
        self.reader = subprocess.Popen(
            [sys.executable, "-c", _READER], env=self.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.client_process: subprocess.Popen[str] | None = None
        self.once, self.armed = self.root / "kill-once", 0

    # -- processes -------------------------------------------------------------------------------------------------------

    def _environment(self, kill_at: str | None) -> dict[str, str]:
        if kill_at is None:
            return self.env
        # A new name each time: a process that was armed before and never struck must not take this one's death.
        self.armed += 1
        self.once = self.root / f"kill-once-{self.armed}"
        self.once.touch()
        return {**self.env, "POWERD_KILL_AT": kill_at, "POWERD_KILL_ONCE": str(self.once)}

    @property
    def struck(self) -> bool:
        """Whether the armed kill point has been reached."""
        return not self.once.exists()

    def disarm(self) -> None:
        self.once.unlink(missing_ok=True)

    def start(self, name: str, kill_at: str | None = None) -> None:
        unit = self.units[name]
        unit.process = subprocess.Popen(
            unit.argv, env=self._environment(kill_at), stdout=self.log, stderr=self.log, text=True, start_new_session=True
        )

    def stop(self, name: str) -> None:
        unit = self.units[name]
        if unit.process is not None:
            if unit.alive:
                unit.process.terminate()
            try:
                unit.process.wait(20)
            except subprocess.TimeoutExpired:
                unit.process.kill()
                raise BrokenPromiseError(f"{name} did not stop on SIGTERM within 20 s") from None
            unit.process = None

    def revive(self) -> None:
        """Do what systemd does for each dead unit: powerd-hw's ExecStopPost, then a restart."""
        for unit in self.units.values():
            if unit.process is not None and not unit.alive:
                if unit.name == "hw":
                    self.restore()
                self.start(unit.name)

    def restore(self) -> None:
        done = subprocess.run(
            [sys.executable, "-I", "-m", "powerd.hw", "restore", "--config", str(self.config)],
            env=self.env, stdout=self.log, stderr=self.log, timeout=30,
        )  # fmt: skip
        if done.returncode not in (0, 75):
            raise BrokenPromiseError(f"restore ended with {done.returncode}")

    def ready(self, after_generation: int | None = None) -> bool:
        """Whether powerd answers, is fed by hw (by a newer one than ``after_generation``) and may control."""
        try:
            with contextlib.closing(Client(self.socket, timeout_s=2)) as client:
                node = client.node()
                fed = node.hw_connected and bool(node.gpus) and bool(client.snapshot().readings)
                return fed and node.control and node.hw_generation != after_generation
        except PowerdError:
            return False

    def generation(self) -> int | None:
        """The generation of the hw worker that powerd hears."""
        with contextlib.closing(Client(self.socket, timeout_s=2)) as client:
            return client.node().hw_generation

    def run_client(self, kill_at: str | None = None) -> subprocess.Popen[str]:
        self.client_process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, str(self.socket)], env=self._environment(kill_at), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        return self.client_process

    def end_client(self) -> None:
        process, self.client_process = self.client_process, None
        if process is not None:
            process.kill()
            process.communicate()

    # -- what is there ---------------------------------------------------------------------------------------------------

    def read(self) -> tuple[int, int]:
        """(power limit in mW, SM clock in MHz) through NVML, by another process."""
        assert self.reader.stdin is not None
        assert self.reader.stdout is not None
        self.reader.stdin.write("\n")
        self.reader.stdin.flush()
        limit, clock = self.reader.stdout.readline().split()
        return int(limit), int(clock)

    def live_leases(self) -> int:
        """How many leases powerd says are live; 0 when it does not answer."""
        try:
            with contextlib.closing(Client(self.socket, timeout_s=2)) as client:
                return len(client.leases())
        except PowerdError:
            return 0

    def at_rest(self) -> bool:
        """Whether both units are up (dead ones are restarted), no lease is live and the reader finds baseline."""
        self.revive()
        return self.ready() and self.live_leases() == 0 and self.read() == BASELINE

    def truth(self) -> str:
        """What the simulator says, for messages."""
        row = self.node.show()["gpus"][0]
        return json.dumps({k: row[k] for k in row if "limit" in k or "lock" in k or "clock" in k})

    def tail(self, lines: int = 25) -> str:
        self.log.flush()
        return "\n".join((self.root / "log").read_text().splitlines()[-lines:])

    def close(self) -> None:
        self.end_client()
        for name in ("powerd", "hw"):
            with contextlib.suppress(BrokenPromiseError):
                self.stop(name)
        for process in (self.load, self.reader):
            process.kill()
            process.communicate()
        for unit in self.units.values():  # a worker outlives neither its supervisor nor the campaign
            if unit.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(unit.process.pid, signal.SIGKILL)
        self.log.close()
        self.node.close()
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """A rig with both units up."""
    made = Rig()
    try:
        made.start("hw")
        made.start("powerd")
        wait_for("powerd ready", made.ready)
        yield made
    finally:
        made.close()
