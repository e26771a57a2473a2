"""A simulated node with powerd on it, as every part of the demonstration needs one, in stepped or in real time.

House rules: what is started here ends with the ``with`` block; a stepped node stands still until ``go``, so that everything
begins at the same simulated moment on every machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from powerd.client import Client
from powerd.clock import SimClock, Waiter
from powerd.demo.children import Child, DemoError
from powerd.errors import UnavailableError
from powerd.sim.node import SimNode, create

MODEL = "a100-sxm-500w"
START_S = 60.0
STEP_NS = 50_000_000  # simulated, between looks whether powerd is up
_FOREIGN = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_KILL_AT", "POWERD_SOCKET", "POWERD_SIM_STATE")


@dataclass(frozen=True, slots=True)
class Stage:
    """A node, its daemon, and the environment in which children find both."""

    node: SimNode
    made_ns: int  # on its clock
    env: dict[str, str]
    folder: Path
    children: contextlib.ExitStack
    hold: Waiter | None  # while it does not wait, stepped time stands still

    def start(self, name: str, *arguments: str) -> Child:
        """Start a process that ends with the stage."""
        child = Child(name, arguments, self.env, self.folder / f"{name}.log")
        self.children.callback(child.stop)
        return child

    def go(self) -> None:
        """Let stepped time move."""
        if self.hold is not None:
            self.hold.close()


@contextlib.contextmanager
def stage(
    gpus: int,
    time_mode: str,
    *,
    latency: float | None = None,
    fit_on: str | None = "every-second",
    profiles: Mapping[str, Path] | None = None,
    model: str = MODEL,
) -> Iterator[Stage]:
    """A node of so many GPUs in this kind of time (real, stepped, x20), with powerd in control of it.

    ``latency`` multiplies the driver's delays; None: none when time is stepped, else those of a real driver.
    """
    with contextlib.ExitStack() as children:
        folder = Path(tempfile.mkdtemp(prefix="pd-demo-"))
        children.callback(shutil.rmtree, folder, ignore_errors=True)
        # The sweep's simulator knows every second measured clock only, so that the error at the others means something. Driver
        # calls take no time there: their number while programs start differs from run to run, and with it the latencies.
        stepped = time_mode == "stepped"
        if latency is None:
            latency = 0.0 if stepped else 1.0
        made_of = {"fit_on": fit_on, "latency": latency, "first_open_s": 1.5 * (not stepped), "profiles": profiles}
        node = children.enter_context(create(model, gpus, time_mode, **made_of))  # type: ignore[arg-type]
        hold, made_ns = None, node.now_ns()
        if stepped:
            node.load()
            hold = SimClock(node.library).waiter("demo")
        ours = {"XDG_RUNTIME_DIR": folder, "XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
        base = {k: v for k, v in os.environ.items() if k not in _FOREIGN}
        env = {**base, **node.env(), **{k: str(v) for k, v in ours.items()}, "POWERD_SOCKET": str(folder / "powerd.sock")}
        made = Stage(node, made_ns, env, folder, children, hold)
        places = ("--run-dir", str(folder), "--state-dir", str(folder / "state"))
        daemon = made.start("powerd", "-m", "powerd.main", "run", "--control", *places)
        children.callback(made.go)  # to stop, powerd needs time to go on
        _wait(made, daemon)
        yield made


def _wait(made: Stage, daemon: Child) -> None:
    deadline_s = time.monotonic() + START_S
    with Client(made.env["POWERD_SOCKET"], timeout_s=10) as client:
        while daemon.process.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(UnavailableError):
                node = client.node()
                if node.hw_connected and node.control and len(client.snapshot().readings) == made.node.gpus:
                    print(f"powerd {node.version} and powerd-hw run, control is on, {len(node.gpus)} GPUs seen (simulated).")
                    return
            time.sleep(0.05)
            if made.hold is not None:
                made.hold.wait_until(made.node.now_ns() + STEP_NS)
    raise DemoError(f"powerd did not come up: {daemon.last_words()}")
