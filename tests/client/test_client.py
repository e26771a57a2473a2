"""What a user of the client relies on, against a daemon's outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from powerd.api import API_HEADER
from powerd.client import Client, default_socket
from powerd.errors import DeniedError, LeaseLostError, RequestError, UnavailableError
from powerd.model import Event, LeaseState, Verdict
from tests.client.fake_daemon import UUIDS, FakeDaemon, node, snapshot


def test_reads_come_back_as_the_objects_that_were_served(daemon: FakeDaemon) -> None:
    client = Client()
    assert client.node() == node()
    assert client.snapshot() == snapshot()
    assert client.explain(0).uuid == client.explain(UUIDS[0][:12]).uuid == UUIDS[0]
    assert client.history(since="1h").series[0].columns["power_w"] == (300.0, None, 310.0)
    assert client.events(limit=5)[0].kind == "lease_granted"
    assert client.healthz().ok
    assert "powerd_gpu_up" in client.metrics()
    assert client.openapi()["openapi"].startswith("3.1")
    assert client.panic().ok
    assert client.quiesce(max_s=60, reason="driver").ok
    assert client.resume().ok
    assert all(headers[API_HEADER] == "1.0" for _, _, _, headers in daemon.requests)


def test_an_older_client_reads_a_newer_daemon_of_its_major_version(daemon: FakeDaemon) -> None:
    daemon.api_version = "1.7"

    def newer(request: web.Request) -> web.Response:
        from powerd.client.codec import encode

        content = encode(snapshot()) | {"brand_new": {"x": [1]}}
        content["readings"][0]["health"] = "dreaming"
        return web.json_response(content, headers={API_HEADER: "1.7"})

    daemon.fault = newer
    assert Client().snapshot().readings[0].health == "dreaming"


def test_another_major_version_is_refused_with_the_remedy(daemon: FakeDaemon) -> None:
    daemon.api_version = "2.0"
    with pytest.raises(RequestError, match=r"speaks API 2\.0.*install the client") as caught:
        Client().node()
    assert caught.value.code.name == "version"


def test_the_stream_yields_snapshots_and_events_and_passes_over_what_is_new(daemon: FakeDaemon) -> None:
    stream = Client().stream(hz=2)
    first, second = next(stream), next(stream)
    assert first == snapshot()
    assert isinstance(second, Event)
    assert second.kind == "drift"
    with pytest.raises(UnavailableError, match="ended the stream"):
        next(stream)


def test_a_lease_attaches_changes_and_releases(daemon: FakeDaemon) -> None:
    client = Client()
    with client.lease([0, UUIDS[1]], sm_clock_mhz=1200, power_limit_w=300, reason="test", job="j1", ttl_s=30) as lease:
        assert lease.held
        assert daemon.attached.keys() == {lease.id}
        assert {o.uuid for o in lease.outcomes} == set(UUIDS)
        body = next(body for method, path, body, _ in daemon.requests if (method, path) == ("POST", "/v1/leases"))
        assert body["gpus"] == list(UUIDS)
        assert body["wants"] == [
            {"control": "sm_clock", "low": 1200, "high": 1200},
            {"control": "power_limit", "low": None, "high": 300_000},
        ]
        assert not lease.overridden
        daemon.verdict = Verdict.OVERRIDDEN
        lease.change(sm_clock_mhz=(900, 1100))
        assert lease.overridden
        assert daemon.leases[lease.id].wants[0].low == 900
    assert daemon.leases == {}
    assert not lease.held
    assert lease.view.state is LeaseState.ENDED
    lease.release()
    assert [m for m, *_ in daemon.requests].count("DELETE") == 1
    secrets = [h.get("Powerd-Lease-Token") for m, _, _, h in daemon.requests if m in ("PATCH", "DELETE")]
    assert secrets == ["secret-1", "secret-1"]


def test_the_lease_dies_with_its_process(daemon: FakeDaemon) -> None:
    code = (
        "from powerd.client import Client; import os, signal\n"
        "lease = Client().lease([0], sm_clock_mhz=1200)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    assert child.wait(20) == -9
    assert daemon.attach_count == 1
    assert daemon.wait(lambda: not daemon.attached and not daemon.leases)


def test_a_forked_child_neither_holds_nor_ends_its_parents_lease(daemon: FakeDaemon) -> None:
    lease = Client().lease([0], sm_clock_mhz=1200)
    pid = os.fork()
    if pid == 0:
        lease.release()
        os._exit(7 if lease.held else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lease.held
    assert daemon.leases.keys() == {lease.id}
    lease.release()


def test_a_daemon_restart_is_survived_by_token(daemon: FakeDaemon) -> None:
    lease = Client().lease([0], sm_clock_mhz=1200)
    kept = dict(daemon.leases)
    daemon.close()
    daemon.leases = kept
    daemon.start()
    assert daemon.wait(lambda: daemon.attach_count == 2)
    assert lease.held
    assert lease.renew()
    lease.release()
    assert daemon.leases == {}


def test_a_lease_that_the_daemon_forgot_is_reported_lost(daemon: FakeDaemon) -> None:
    lease = Client().lease([0], sm_clock_mhz=1200)
    daemon.close()
    daemon.leases = {}
    daemon.start()
    lease._stop.wait(10)
    assert not lease.held
    assert "ended" in lease.lost_reason
    with pytest.raises(LeaseLostError, match="acquire it again"):
        lease.change(sm_clock_mhz=1000)
    lease.release()


def test_the_heartbeat_renews_in_the_nodes_own_time(daemon: FakeDaemon) -> None:
    with Client().lease([0], sm_clock_mhz=1200, ttl_s=6):  # x20: every 2 simulated seconds is every 0.1 s here
        assert daemon.wait(lambda: sum(path.endswith("/heartbeat") for _, path, _, _ in daemon.requests) >= 3)


def test_a_detached_lease_is_neither_attached_nor_kept_alive(daemon: FakeDaemon) -> None:
    lease = Client().lease([0], sm_clock_mhz=1200, detached=True, ttl_s=600)
    assert lease.held
    assert daemon.attach_count == 0
    assert daemon.leases[lease.id].detached


def test_a_lease_that_cannot_be_attached_is_given_back(daemon: FakeDaemon) -> None:
    (daemon.folder / "attach.sock").unlink()
    with pytest.raises(UnavailableError, match="cannot attach"):
        Client().lease([0], sm_clock_mhz=1200)
    assert daemon.leases == {}


def test_wants_that_make_no_sense_never_reach_the_daemon(daemon: FakeDaemon) -> None:
    client = Client()
    for wrong in ({}, {"sm_clock_mhz": (1300, 900)}, {"power_limit_w": -1}, {"sm_clock_mhz": (None, None)}):
        with pytest.raises(RequestError):
            client.lease([0], **wrong)
    with pytest.raises(RequestError, match="no GPU '9'"):
        client.lease([9], sm_clock_mhz=1200)
    assert daemon.leases == {}


def test_energy_windows_are_measured_by_the_daemon(daemon: FakeDaemon) -> None:
    with Client().energy("step", [0]) as window:
        assert window.energy_j is None
    assert window.energy_j == 1234.5
    assert (window.low_j, window.high_j, window.duration_s) == (1230.0, 1239.0, 4.0)


def test_an_exception_inside_a_window_or_lease_is_the_callers_own(daemon: FakeDaemon) -> None:
    client = Client()
    with pytest.raises(ZeroDivisionError), client.lease([0], sm_clock_mhz=1200), client.energy("x", [0]):  # noqa: PT012
        daemon.close()
        raise ZeroDivisionError
    daemon.start()


def test_errors_carry_the_daemons_words_and_code(daemon: FakeDaemon) -> None:
    daemon.node = node(control=False)
    with pytest.raises(DeniedError, match=r"only monitors here \(set control = true\)"):
        Client().lease([0], sm_clock_mhz=1200)


def test_a_server_of_a_wrong_user_is_refused(daemon: FakeDaemon) -> None:
    with pytest.raises(DeniedError, match="runs as uid"):
        Client(server_uids=[os.getuid() + 1]).node()
    assert Client(server_uids=[os.getuid()]).node().hostname == "node7"
    assert len(daemon.requests) == 1


def test_a_missing_daemon_says_what_to_do(run_folder: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no powerd at .*start it with"):
        Client(run_folder / "none.sock").snapshot()


def test_the_socket_is_found_without_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POWERD_SOCKET", "/somewhere/else.sock")
    assert default_socket() == Path("/somewhere/else.sock")
    monkeypatch.delenv("POWERD_SOCKET")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "powerd").mkdir()
    (tmp_path / "powerd" / "powerd.sock").touch()
    assert default_socket() == tmp_path / "powerd" / "powerd.sock"


def test_importing_the_client_pulls_in_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import powerd.client\n"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*sorted(names - set(sys.stdlib_module_names) - {'powerd'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
