"""A simulated node with both units of powerd up, and every door through which a user can say something wrong.

House rules: what a door answers is one `Answer`, whether it was a command or a request; processes started here are ended here,
by their id; paths stay short, because socket names have to be.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerd.client import Client
from powerd.errors import PowerdError
from powerd.sim import node as nodes
from powerd.sim.node import SimNode

MODULES = {"powerctl": "powerd.cli.main", "powerd": "powerd.main"}
NOBODY = 65534

# The command line's own environment must not decide what a test means.
_FOREIGN = ("POWERD_SOCKET", "POWERD_URL", "POWERD_TOKEN_FILE", "POWERD_LEASE_TOKEN", "POWERD_KILL_AT", "POWERD_KILL_ONCE",
            "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LOCAL_RANK", "SLURM_GPU_FREQ", "SLURM_JOB_GPUS", "COLUMNS",
            nodes.STATE_VARIABLE)  # fmt: skip

# Becomes somebody else after everything is imported, so that it needs no file that only root can read.
_AS_NOBODY = f"""
import os, socket, sys
link = socket.socket(socket.AF_UNIX)
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
link.connect(sys.argv[1])
link.sendall(sys.stdin.buffer.read())
while part := link.recv(65536):
    sys.stdout.buffer.write(part)
"""


@dataclass(frozen=True)
class Answer:
    """What came back: an exit code or an HTTP status, what was said on stdout (or the body) and what on stderr."""

    code: int
    out: str
    err: str = ""

    @property
    def lines(self) -> list[str]:
        """What a person reads on stderr; the daemon's event log is not for them."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("event=")]

    def json(self) -> Any:
        """The answer as data."""
        return json.loads(self.out)


def header(name: str, value: str) -> dict[str, Any]:
    """One header whose name is a constant, for ``**`` of ``LiveNode.http``."""
    return {name: value}


def wait_for(what: str, test: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll a condition of another process; AssertionError when it does not come."""
    end = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        threading.Event().wait(0.02)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer powerd."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def command(program: str, *arguments: str) -> list[str]:
    """How a program of ours is started: by this interpreter, from this tree."""
    return [sys.executable, "-m", MODULES[program], *arguments]


def free_port() -> int:
    """A TCP port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LiveNode:
    """Simulated GPUs, powerd on them, and its doors; use as a context manager."""

    def __init__(
        self,
        *,
        control: bool = True,
        gpus: int = 2,
        model: str = "a100-sxm-500w",
        more: str = "",
        time: str = "real",
        hw: str = "",
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pd"))
        self.root.chmod(0o755)  # others than we ask for permission too
        self.node: SimNode = nodes.create(model, gpus, time, seed=5)
        self.config = self.root / "powerd.toml"
        self.run_dir, self.state_dir = self.root / "run", self.root / "state"
        self.socket = self.run_dir / "powerd.sock"
        self.tcp_port = free_port()
        self.token_file = self.root / "token"
        self.token_file.write_text("not-a-guessable-token-0123456789\n")
        self.token_file.chmod(0o600)
        self.config_text = f"""\
[daemon]
control = {str(control).lower()}
run_dir = "{self.run_dir}"
state_dir = "{self.state_dir}"
panic_file = "{self.root}/panic"
[hw]
run_dir = "{self.root}/hw"
journal_dir = "{self.root}/journal"
{hw}
[tcp]
listen = "127.0.0.1:{self.tcp_port}"
token_file = "{self.token_file}"
{more}"""
        self.write_config(self.config_text)
        self.env = {**clean_environment(), **self.node.env(clean_environment()), "HOME": str(self.root), "COLUMNS": "200"}
        for name in ("CONFIG_HOME", "RUNTIME_DIR", "STATE_HOME", "CACHE_HOME"):
            self.env[f"XDG_{name}"] = str(self.root / "xdg")
        self.env["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # the compiled driver
        self.env["POWERD_SOCKET"] = str(self.socket)
        self.log = self.root / "log"
        self._log = self.log.open("ab")
        self.client = Client(self.socket)
        self.start()

    def start(self) -> None:
        """Start powerd, at first or after its end, and wait for its first samples."""
        self.process = subprocess.Popen(
            command("powerd", "run", "--config", str(self.config)), env=self.env, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for("powerd serves samples", self._serves)
        except BaseException:
            print(self.log.read_text(), file=sys.stderr)
            self.close()
            raise

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(PowerdError):
            return len(self.client.snapshot().readings) == self.node.gpus
        return False

    def write_config(self, text: str, mode: int = 0o644) -> None:
        """Replace the configuration file; nobody reads it before SIGHUP."""
        self.config.write_text(text)
        self.config.chmod(mode)

    def reload(self) -> None:
        """SIGHUP, and wait until powerd says what it made of it."""
        seen = max((e.seq for e in self.client.events()), default=0)
        os.kill(self.process.pid, signal.SIGHUP)
        kinds = {"config_reloaded", "config_refused"}
        wait_for("powerd answers SIGHUP", lambda: any(e.kind in kinds for e in self.client.events(since=seen)))

    @property
    def uuids(self) -> list[str]:
        """The GPUs by index."""
        return [str(row["uuid"]) for row in self.node.show()["gpus"]]

    @property
    def locked(self) -> int:
        """How many GPUs have locked clocks, as the simulator knows."""
        return sum(bool(row["locked_clocks_mhz"]) for row in self.node.show()["gpus"])

    # --- doors --------------------------------------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, stdin: str | None = None, env: Mapping[str, str] | None = None) -> Answer:
        """Any command with this node's environment."""
        done = subprocess.run(
            list(argv),
            env={**self.env, **(env or {})},
            cwd=self.root,
            text=True,
            capture_output=True,
            timeout=120,
            input=stdin or "",
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def powerctl(self, *arguments: str, env: Mapping[str, str] | None = None) -> Answer:
        """The client's command line against this node."""
        return self.run(command("powerctl", *arguments), env=env)

    def powerd(self, *arguments: str, env: Mapping[str, str] | None = None) -> Answer:
        """The daemon's command line on this node."""
        return self.run(command("powerd", *arguments), env=env)

    def http(self, method: str, path: str, body: object = None, *, tcp: bool = False, **headers: str) -> Answer:
        """One request as this user; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.tcp_port, timeout=20)
        if not tcp:
            link.sock = socket.socket(socket.AF_UNIX)
            link.sock.settimeout(20)
            link.sock.connect(str(self.socket))
        try:
            link.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = link.getresponse()
            return Answer(response.status, response.read().decode())
        finally:
            link.close()

    def http_as_nobody(self, method: str, path: str, body: object = None) -> Answer:
        """One request as a user without any right here; needs root."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: powerd\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        done = subprocess.run(
            [sys.executable, "-I", "-c", _AS_NOBODY, str(self.socket)],
            input=head + data,
            capture_output=True,
            timeout=20,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr.decode()
        top, _, content = done.stdout.partition(b"\r\n\r\n")
        return Answer(int(top.split()[1]), content.decode())

    def attach(self, message: bytes) -> Answer:
        """One first message on the attach socket; code 0 when a lease came back, 1 for an error."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(20)
            link.connect(str(self.run_dir / "attach.sock"))
            link.send(message)
            body = link.recv(65536).decode()
        return Answer(1 if "error" in json.loads(body) else 0, body)

    # --- truth --------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a refused request must leave alone: GPU settings, leases, what powerd believes of its configuration."""
        node = self.client.node()
        settings = ("limit_mw", "locked_clocks_mhz", "memory_lock_max_mhz", "persistence", "mig", "setter_calls")
        return {
            "gpus": [{name: row[name] for name in settings} for row in self.node.show()["gpus"]],
            "leases": sorted((v.id, v.state.value, v.wants, v.gpus) for v in self.client.leases()),
            "node": (node.control, node.panic, node.quiesced, node.hw_connected, node.hw_generation, node.config_error),
            "config": self.config.read_text(),
        }

    def close(self) -> None:
        """Stop powerd as a user does and remove everything; twice is harmless."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.client.close()
        self._log.close()
        self.node.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> LiveNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def load(self, gpu: int = 0, share: float = 0.3) -> Iterator[None]:
        """A steady load on one GPU while the block runs."""
        argv = [sys.executable, "-m", "powerd.sim.workload", "--gpu", str(gpu), "--load", str(share), "--seconds", "1e6"]
        child = subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            wait_for("the load runs", lambda: self.node.show()["gpus"][gpu]["processes"] > 0)
            yield
        finally:
            child.kill()
            child.wait()
