"""Jobs and energy spans through a running powerd: who may report what, what is refused, what a restart keeps."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from powerd.api import JobEvent, JobStep, Span
from powerd.client import Client, JobLog
from tests.e2e.daemon_rig import Rig, limit
from tests.e2e.fake_hw import now_ns

NOBODY = 65534
S = 1_000_000_000


_AS = """
import json, os, sys
socket, uid, method, path, body = sys.argv[1:6]
import http.client, socket as sockets
link = http.client.HTTPConnection("powerd")
link.sock = sockets.socket(sockets.AF_UNIX)
os.setgroups([]), os.setgid(int(uid)), os.setuid(int(uid))
link.sock.connect(socket)
link.request(method, path, body.encode() or None)
answer = link.getresponse()
print(answer.status, answer.read().decode())
"""


def as_user(made: Rig, uid: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """One request as another user; the tests run as root where they run."""
    text = "" if body is None else json.dumps(body)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _AS, str(made.socket), str(uid), method, path, text],
        capture_output=True, text=True, timeout=30, cwd="/", check=True,
    )  # fmt: skip
    status, _, answer = done.stdout.partition(" ")
    return int(status), json.loads(answer)


def step(number: int, gpus: list[str], energy_j: float = 100.0) -> dict[str, Any]:
    return {"step": number, "begin_ns": number * S, "end_ns": number * S + S // 2, "gpus": gpus, "energy_j": energy_j}


def test_a_job_reports_and_is_read(node: Rig) -> None:
    client = Client(node.socket)
    with JobLog(client, "run 7/a", gpus=node.hw.uuids[:1], interval_s=60) as log:
        for number in range(5):
            log.step(number, number * S, number * S + S, energy_j=50.0)
        log.restore(2)
    view = client.job("run 7/a")
    assert (view.state, view.steps, view.lost_steps, view.energy_j, view.time_s) == ("ended", 3, 2, 250.0, 1.0)
    assert view in client.jobs()
    page = node.exchange("GET", "/metrics")[1].decode()
    assert 'powerd_jobs{state="ended"} 1.0' in page
    assert "powerd_job_lost_steps_total 2.0" in page
    assert "powerd_job_energy_joules_total 250.0" in page


def test_a_restart_keeps_jobs(own: Rig) -> None:
    own.start()
    body = {"kind": "step", "steps": [step(n, own.hw.uuids[:1]) for n in range(1, 6)]}
    assert own.request("POST", "/v1/jobs/kept/events", body)[0] == 200
    before = own.get("/v1/jobs/kept")
    own.stop()
    own.start()
    assert own.get("/v1/jobs/kept") == before
    own.stop(signal.SIGKILL)
    own.start()
    assert own.get("/v1/jobs/kept") == before, "what is in the file survives any end"


def test_another_user_sees_and_says_nothing_of_a_job_and_owns_its_own(node: Rig) -> None:
    assert node.request("POST", "/v1/jobs/mine/events", {"kind": "start"})[0] == 200
    assert as_user(node, NOBODY, "GET", "/v1/jobs") == (200, [])
    assert as_user(node, NOBODY, "GET", "/v1/jobs/mine")[0] == 404
    status, answer = as_user(node, NOBODY, "POST", "/v1/jobs/theirs/events", {"kind": "start"})
    assert (status, answer["error"]["code"]) == (403, "denied"), "who runs nothing here has no job here"
    assert as_user(node, NOBODY, "POST", "/v1/perseus/plan", {"profile_rows": []})[0] == 403, "nor any CPU time"
    with socket.socket(socket.AF_UNIX):  # a process of that user on GPU 1
        holder = subprocess.Popen([sys.executable, "-I", "-c", _HOLD, str(node.socket), str(NOBODY)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, cwd="/")  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdin is not None
        try:
            node.hw.set_processes({node.hw.uuids[1]: [int(holder.stdout.readline())]})

            def ask(path: str, body: Any) -> tuple[int, Any]:
                assert holder.stdin is not None
                assert holder.stdout is not None
                holder.stdin.write(json.dumps([path, body]) + "\n")
                holder.stdin.flush()
                return tuple(json.loads(holder.stdout.readline()))

            events = "/v1/jobs/theirs/events"
            node.until(lambda: ask(events, {"kind": "start"})[0] == 200, "its process proves nothing")
            assert ask(events, {"kind": "step", "steps": [step(1, node.hw.uuids[1:2])]})[0] == 200
            assert ask("/v1/jobs/mine/events", {"kind": "end"})[0] == 403
            other = {"uuid": node.hw.uuids[0], "spans": [{"label": "x", "begin_ns": 1, "end_ns": 2}], "wait": False}
            assert ask("/v1/energy/spans", other)[0] == 403
            assert ask("/v1/energy/spans", {**other, "uuid": node.hw.uuids[1]})[0] == 200
            assert ask("/v1/jobs/new/events", {"kind": "step", "steps": [step(1, node.hw.uuids[:1])]})[0] == 403
        finally:
            holder.stdin.close()
            holder.wait(10)
            node.hw.set_processes({})
    assert as_user(node, NOBODY, "GET", "/v1/jobs/theirs")[1]["steps"] == 1
    assert as_user(node, NOBODY, "POST", "/v1/jobs/theirs/events", {"kind": "end"})[0] == 200, "its own job may still end"
    assert node.get("/v1/jobs/theirs")["state"] == "ended"


_HOLD = """
import http.client, json, os, socket, sys
os.setgroups([]), os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
print(os.getpid(), flush=True)
for line in sys.stdin:
    path, body = json.loads(line)
    link = http.client.HTTPConnection("powerd")
    link.sock = socket.socket(socket.AF_UNIX)
    link.sock.connect(sys.argv[1])
    link.request("POST", path, json.dumps(body))
    answer = link.getresponse()
    print(json.dumps([answer.status, json.loads(answer.read())]), flush=True)
"""


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/jobs/j/events", {"kind": "begin"}, 422, "unknown kind"),
        ("/v1/jobs/j/events", {"kind": "step", "stepps": []}, 400, "unknown field"),
        ("/v1/jobs/j/events", {"kind": "step", "steps": [step(1, ["GPU-x"])]}, 404, "no GPU"),
        ("/v1/energy/spans", {"uuid": "GPU-x", "spans": []}, 404, "no GPU"),
        ("/v1/energy/spans", {"uuid": "{gpu}", "spans": []}, 400, "no spans"),
        ("/v1/energy/spans", {"uuid": "{gpu}", "spans": [{"label": "x", "begin_ns": 3, "end_ns": 2}]}, 422, "span 0"),
        ("/v1/perseus/plan", {"profile": "/etc/passwd"}, 422, "no profile file"),
        ("/v1/perseus/plan", {"schedule": "1f1b"}, 422, "profile_rows"),
        ("/v1/perseus/plan", [1], 400, "JSON object"),
    ],
)
def test_nonsense_is_refused_with_its_place(node: Rig, path: str, body: Any, status: int, says: str) -> None:
    if isinstance(body, dict) and body.get("uuid") == "{gpu}":
        body = {**body, "uuid": node.hw.uuids[0]}
    code, answer = node.request("POST", path, body)
    assert (code, says in answer["error"]["message"]) == (status, True), answer
    assert [v for v in node.get("/v1/jobs") if v["job"] == "j"] == []


def test_bodies_have_a_bound_each(node: Rig) -> None:
    spans = [{"label": "forward", "begin_ns": n, "end_ns": n} for n in range(20_000)]
    status, answer = node.request("POST", "/v1/energy/spans", {"uuid": node.hw.uuids[0], "spans": spans, "wait": False})
    assert status == 200, answer
    status, answer = node.request("POST", "/v1/jobs/j/events", b" " * ((1 << 20) + 1))
    assert (status, answer["error"]["message"]) == (400, "the body is too large")
    status, answer = node.request("POST", "/v1/windows", b" " * (64 * 1024 + 1))
    assert status == 400


def test_spans_of_a_leased_gpu_are_answered_from_samples(own: Rig) -> None:
    own.start()
    client = Client(own.socket)
    begin = client.now_ns()
    assert abs(begin - now_ns()) < S
    own.granted(limit(300), detached=True)
    own.until(lambda: own.get("/v1/snapshot")["time_ns"] > begin + S, "no samples")
    view = client.spans(own.hw.uuids[0], [Span("work", begin + S // 4, begin + 3 * S // 4)])
    (row,) = view.labels
    assert view.method == "counter"
    assert row.sm_clock_mhz == 1980
    assert row.clock_event_reasons == ("sw_power_cap",)
    assert row.energy_j == pytest.approx(150, rel=0.4), "300 W for half a second, on a machine that may be busy"


def test_job_events_by_hand(node: Rig) -> None:
    client = Client(node.socket)
    row = JobStep(4, 0, 2 * S, tuple(node.hw.uuids), "p", 12.0, 1200.0)
    assert client.job_event("by hand", JobEvent("step", steps=(row,))).ok
    assert client.job("by hand").plan == "p"
