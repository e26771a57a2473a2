"""A daemon under test on a simulated node in real time, and a small client that adds nothing of its own.

House rules: both units run as users run them (`python -m powerd.main run`); only processes started here are ended.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import load
from powerd.api import API_HEADER, API_VERSION, LEASE_TOKEN_HEADER
from powerd.sim.node import SimNode, create
from powerd.sim.workload import LOAD, Context

CONFIG = """
[daemon]
control = true
run_dir = "{run}"
state_dir = "{state}"
panic_file = "{state}/panic"
[hw]
journal_dir = "{state}/hw"
sample_hz = {hz}
"""
START_TIMEOUT_S = 60.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket with keep-alive."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Just enough of the API for measuring; the public client is powerd.client."""

    def __init__(self, path: Path) -> None:
        self._connection = UnixConnection(path)
        self._headers = {API_HEADER: ".".join(map(str, API_VERSION)), "Content-Type": "application/json"}

    def raw(self, method: str, path: str, body: object = None, token: str | None = None) -> bytes:
        """One request; RuntimeError with the daemon's own words when it is refused."""
        headers = self._headers | ({LEASE_TOKEN_HEADER: token} if token else {})
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {answer.decode(errors='replace')}")
        return answer

    def call(self, method: str, path: str, body: object = None, token: str | None = None) -> Any:
        """One request with a JSON answer."""
        return json.loads(self.raw(method, path, body, token))


@dataclass(slots=True)
class Running:
    """A daemon that measures a simulated node."""

    node: SimNode
    process: subprocess.Popen[bytes]
    socket: Path
    uuids: tuple[str, ...]

    def client(self) -> Client:
        """A connection of its own."""
        return Client(self.socket)

    def processes(self) -> list[psutil.Process]:
        """All processes of both units."""
        daemon = psutil.Process(self.process.pid)
        return [daemon, *daemon.children(recursive=True)]


@contextlib.contextmanager
def running(model: str = "h100-sxm", gpus: int = 8, hz: float = 10.0, *, busy: bool = True) -> Iterator[Running]:
    """A node in real time with every GPU under a steady load, and powerd on it; ended and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pb-"))
    log = (folder / "log").open("wb")
    process: subprocess.Popen[bytes] | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(log.close)
        node = stack.enter_context(create(model, gpus, time="real"))
        if busy:
            _busy(node, stack)
        config = folder / "powerd.toml"
        config.write_text(CONFIG.format(run=folder / "run", state=folder / "state", hz=hz))
        config.chmod(0o644)
        environment = {**os.environ, **node.env()}
        command = [sys.executable, "-m", "powerd.main", "run", "--config", str(config)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        path = folder / "run" / "powerd.sock"
        try:
            uuids = _wait(process, path, gpus)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{(folder / 'log').read_text(errors='replace')[-2000:]}") from None
        yield Running(node, process, path, uuids)


def _busy(node: SimNode, stack: contextlib.ExitStack) -> None:
    for gpu in range(node.gpus):
        context = stack.enter_context(Context(gpu, node=node))
        load.begin(context, LOAD, "mixed", 0.9, 3600 * 10**9)


def _wait(process: subprocess.Popen[bytes], path: Path, gpus: int) -> tuple[str, ...]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"powerd ended with {process.returncode}")
        try:
            readings = Client(path).call("GET", "/v1/snapshot")["readings"]
            if len(readings) == gpus and all(r["energy_mj"] for r in readings):
                return tuple(r["uuid"] for r in readings)
        except (OSError, RuntimeError, KeyError, TypeError, http.client.HTTPException):
            pass  # not there yet
        time.sleep(0.2)
    raise RuntimeError(f"powerd did not show {gpus} GPUs within {START_TIMEOUT_S:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
