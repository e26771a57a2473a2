"""powerd over TCP: nothing without the token, reads for loopback where the site says so, TLS, no unsafe listener."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from typing import Any

import pytest

from powerd.client import Client
from powerd.errors import DeniedError, UnavailableError
from tests.e2e.daemon_rig import Rig, pin


def tcp_config(node: Rig, **values: Any) -> None:
    lines = "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
    node.write(f"[daemon]\ncontrol = true\n[tcp]\n{lines}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask_tcp(
    port: int, method: str, path: str, body: Any = None, context: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, Any]:
    connection: http.client.HTTPConnection
    if context is not None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def token_file(node: Rig, token: str = "s" * 32) -> str:
    path = node.folder / "token"
    path.write_text(token + "\n")
    path.chmod(0o600)
    return str(path)


def test_over_tcp_nothing_without_the_token_and_control_with_it(own: Rig) -> None:
    port = free_port()
    tcp_config(own, listen=f"127.0.0.1:{port}", token_file=token_file(own))
    own.start()
    assert ask_tcp(port, "GET", "/v1/node")[0] == 403
    assert ask_tcp(port, "GET", "/v1/node", Authorization="Bearer wrong")[0] == 403
    right: dict[str, Any] = {"Authorization": "Bearer " + "s" * 32}
    assert ask_tcp(port, "GET", "/v1/snapshot", **right)[0] == 200
    body = {"gpus": own.hw.uuids[:1], "wants": [pin(900)], "reason": "r"}
    status, answer = ask_tcp(port, "POST", "/v1/leases", body, **right)
    assert (status, "detached" in answer["error"]["message"]) == (422, True)
    assert ask_tcp(port, "POST", "/v1/leases", {**body, "detached": True}, **right)[0] == 200


def test_loopback_reads_without_a_token_are_reads_only_and_for_local_names(own: Rig) -> None:
    port = free_port()
    tcp_config(own, listen=f"127.0.0.1:{port}", loopback_reads=True)
    own.start()
    assert len(ask_tcp(port, "GET", "/v1/snapshot")[1]["readings"]) == 2
    assert ask_tcp(port, "POST", "/v1/panic")[0] == 403
    assert ask_tcp(port, "GET", "/v1/snapshot", Host="evil.example")[0] == 403


def test_tls_is_served(own: Rig) -> None:
    port, key, certificate = free_port(), own.folder / "key.pem", own.folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run(
        [*command, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    tcp_config(own, listen=f"127.0.0.1:{port}", token_file=token_file(own), certificate=str(certificate), key=str(key))
    own.start()
    context = ssl.create_default_context(cafile=str(certificate))
    assert ask_tcp(port, "GET", "/v1/node", context=context, Authorization="Bearer " + "s" * 32)[0] == 200
    with Client(url=f"https://127.0.0.1:{port}", token_file=own.folder / "token", ca_file=certificate) as trusting:
        assert len(trusting.snapshot().readings) == 2
        lease = trusting.lease(own.hw.uuids[:1], sm_clock_mhz=900, reason="from afar", detached=True)
        assert lease.held
        lease.release()
    with Client(url=f"https://127.0.0.1:{port}", token_file=own.folder / "token") as doubting, pytest.raises(UnavailableError):
        doubting.snapshot()  # nobody vouches for this certificate
    with Client(url=f"https://127.0.0.1:{port}", ca_file=certificate) as unknown, pytest.raises(DeniedError):
        unknown.snapshot()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"listen": "0.0.0.0:9478", "token_file": "{token}"}, "TLS"),
        ({"listen": "127.0.0.1:9478"}, "token_file"),
        ({"listen": "localhost", "token_file": "{token}"}, "ADDRESS:PORT"),
        ({"listen": "127.0.0.1:9478", "token_file": "/nowhere"}, "token_file"),
        ({"listen": "0.0.0.0:9478", "token_file": "{token}", "certificate": "/x.pem"}, "belong together"),
    ],
)
def test_an_unsafe_tcp_listener_is_refused_at_start(own: Rig, values: dict[str, str], says: str) -> None:
    tcp_config(own, **{k: v.replace("{token}", token_file(own)) for k, v in values.items()})
    result = subprocess.run(own.command(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 78
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
