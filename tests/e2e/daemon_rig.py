"""A powerd process before a fake powerd-hw, and the plainest possible client of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.fake_hw import FakeHw

CONFIG = """
[daemon]
control = true
reattach_s = 1.0
[hw]
min_dwell_s = 0.2
[replicas]
scrape_s = 0.1
stale_s = 0.8
good_scrapes = 2
window_s = 1
park_after_s = 0.5
"""


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("powerd", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


class Rig:
    def __init__(self, folder: Path, hw: FakeHw) -> None:
        self.folder, self.hw = folder, hw
        self.config = folder / "powerd.toml"
        self.socket = folder / "run" / "powerd.sock"
        self.process: subprocess.Popen[str] | None = None
        self.write(CONFIG)

    def write(self, text: str) -> None:
        panic = f'panic_file = "{self.folder}/panic"\n'
        self.config.write_text(
            text.replace("[daemon]\n", "[daemon]\n" + panic) if "[daemon]" in text else text + "\n[daemon]\n" + panic
        )

    def command(self, *options: str) -> list[str]:
        base = [sys.executable, "-m", "powerd.main", "run", "--config", str(self.config), "--hw-socket", str(self.hw.path)]
        return [*base, "--run-dir", str(self.folder / "run"), "--state-dir", str(self.folder / "state"), *options]

    def start(self, *options: str, wait: bool = True, **environment: str) -> subprocess.Popen[str]:
        log = (self.folder / "log").open("a")
        with log:
            self.process = subprocess.Popen(
                self.command(*options), stdout=log, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
            )
        if wait:
            self.until(lambda: self.get("/v1/node")["hw_connected"] and self.get("/v1/node")["gpus"], "powerd did not come up")
            self.until(lambda: self.request("GET", "/v1/snapshot")[0] == 200, "no snapshot")
        return self.process

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def until(self, condition: Any, what: str, timeout_s: float = 15.0) -> Any:
        """Poll what has no event of its own: another process that comes up or a state behind its API."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, KeyError):
                if (answer := condition()) not in (None, False, []):
                    return answer
            time.sleep(0.02)
        raise AssertionError(f"{what}\n{self.log()}")

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        status, data, _ = self.exchange(method, path, body, **headers)
        return status, json.loads(data)

    def exchange(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = UnixConnection(self.socket)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, answer = self.request("GET", path)
        assert status == 200, answer
        return answer

    def acquire(self, *wants: dict[str, Any], gpus: list[str] | None = None, **more: Any) -> tuple[int, Any]:
        body = {"gpus": gpus or self.hw.uuids[:1], "wants": list(wants), "reason": "test", **more}
        return self.request("POST", "/v1/leases", body)

    def granted(self, *wants: dict[str, Any], **more: Any) -> Any:
        status, answer = self.acquire(*wants, **more)
        assert status == 200, answer
        return answer

    def attach(self, lease: dict[str, Any], token: str | None = None, api: str = "1.0") -> tuple[socket.socket, Any]:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.settimeout(10)
        link.connect(str(self.socket.with_name("attach.sock")))
        link.send(json.dumps({"api": api, "lease": lease["id"], "token": token or lease["token"]}).encode())
        answer = link.recv(4096)
        return link, json.loads(answer) if answer else None

    def lease(self, lease: dict[str, Any]) -> Any:
        return self.get(f"/v1/leases/{lease['id']}")

    def events(self, kind: str) -> list[Any]:
        return [e for e in self.get("/v1/events?limit=1000") if e["kind"] == kind]


def pin(mhz: int) -> dict[str, Any]:
    return {"control": "sm_clock", "low": mhz, "high": mhz}


def limit(watts: int) -> dict[str, Any]:
    return {"control": "power_limit", "low": watts * 1000, "high": watts * 1000}


@contextlib.contextmanager
def rig(gpus: int = 2) -> Iterator[Rig]:
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    folder.chmod(0o755)  # other users reach the sockets
    hw = FakeHw(folder / "hw.sock", gpus)
    made = Rig(folder, hw)
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.process.kill()
            made.process.wait()
        hw.close()
        shutil.rmtree(folder, ignore_errors=True)


def closed(link: socket.socket) -> bool:
    """Whether the other side has hung up, once everything it said is read."""
    while select.select([link], [], [], 10)[0]:
        if not link.recv(4096):
            return True
    return False
