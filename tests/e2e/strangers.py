"""A process of another user that asks powerd: what the kernel says of it, not what it says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.daemon_rig import Rig

NOBODY = 65534
_ASK = """
import http.client, json, os, socket, sys
path, method, route, body, headers = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
if os.getuid() == 0:
    os.setgroups(json.loads(sys.argv[6])); os.setgid(65534); os.setuid(65534)
print(os.getpid(), flush=True)
class C(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX); self.sock.connect(path)
for line in sys.stdin:
    c = C("x"); c.request(method, route, body or None, headers); r = c.getresponse()
    print(r.status, r.read().decode().replace(chr(10), " "), flush=True)
"""


class Stranger:
    """A process of another user."""

    def __init__(
        self, node: Rig, route: str, method: str = "GET", body: str = "", groups: list[int] | None = None, **headers: str
    ) -> None:
        named = json.dumps({n.replace("_", "-"): v for n, v in headers.items()})
        command = [sys.executable, "-c", _ASK, str(node.socket), method, route, body, named, json.dumps(groups or [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())

    def ask(self) -> tuple[int, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        status, _, body = self.process.stdout.readline().partition(" ")
        return int(status), json.loads(body)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


needs_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="becoming another user needs root")
