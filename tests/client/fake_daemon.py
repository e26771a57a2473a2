"""A daemon's outside: canned api objects over a Unix socket and the attach socket, with faults on request.

House rules: answers are encoded from powerd.api types, so that a changed type breaks the tests; every request is recorded.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from powerd import api
from powerd.client.codec import decode, encode
from powerd.model import (
    Capabilities,
    Control,
    EnergyMethod,
    Event,
    Gpu,
    Health,
    Interval,
    LeaseEnd,
    LeaseState,
    Outcome,
    PlanState,
    Reading,
    Setpoint,
    Support,
    Verdict,
    Want,
    WantClass,
)
from powerd.records import GpuProcess, HostLoad, JobStepRow, LeaseRow
from powerd.replicatypes import ReplicaView, SloSpec

UUIDS = ("GPU-11111111-1111-4111-8111-111111111111", "GPU-22222222-2222-4222-8222-222222222222")


def capability(index: int) -> Capabilities:
    return Capabilities(
        gpu=Gpu(UUIDS[index], index, "NVIDIA A100-SXM4-80GB", f"00000000:{index + 1:02x}:00.0", index),
        driver_version="580.65.06", power_limit_min_mw=100_000, power_limit_max_mw=500_000, power_limit_default_mw=500_000,
        sm_clocks_mhz=tuple(range(210, 1411, 15)), memory_clocks_mhz=(1593,), energy_counter=True, persistence=True, mig=False,
        simulated=True,
        controls={c: Support(False, "one clock only") if c is Control.MEMORY_CLOCK else Support(True) for c in Control},
    )  # fmt: skip


def node(**changes: Any) -> api.NodeView:
    view = api.NodeView(
        version="0.1.0", api_version="1.0", hostname="node7", simulated=True, time_scale=20.0, control=True, control_why="",
        panic=False, quiesced=False, driver_version="580.65.06", hw_connected=True, hw_generation=1, sample_hz=10.0,
        started_wall_ns=1_790_000_000_000_000_000, config_reload_ok=True, config_error="", gpus=(capability(0), capability(1)),
    )  # fmt: skip
    return replace(view, **changes)


def reading(index: int, **changes: Any) -> Reading:
    base = Reading(
        uuid=UUIDS[index], time_ns=5_000_000_000, health=Health.UP, epoch=1, energy_mj=123_456, energy_time_ns=4_990_000_000,
        power_mw=312_400, power_average_mw=310_000, sm_clock_mhz=1200, memory_clock_mhz=1593, temperature_c=54,
        utilization_percent=97, memory_used_bytes=60 << 30, memory_total_bytes=80 << 30, power_limit_requested_mw=500_000,
        power_limit_enforced_mw=500_000, clock_event_reasons=0x4, energy_method=EnergyMethod.COUNTER,
    )  # fmt: skip
    return replace(base, **changes)


def snapshot() -> api.SnapshotView:
    dark = reading(1, power_mw=None, sm_clock_mhz=None, temperature_c=None, health=Health.LOST, clock_event_reasons=None)
    return api.SnapshotView(7, 5_000_000_000, 1_790_000_000_000_000_000, 0.08, True, (reading(0), dark))


def outcome(uuid: str, want: api.WantSpec, verdict: Verdict = Verdict.APPLIED) -> Outcome:
    value = Interval(want.low or want.high or 0, want.high or want.low or 0)
    return Outcome(uuid=uuid, control=want.control, seq=3, requested=value, verdict=verdict, accepted=value, observed=value.high)


def explain(uuid: str) -> api.Explain:
    want = Want("lease-1", uuid, Control.SM_CLOCK, Interval(1200, 1200), WantClass.LEASE, "fine-tuning")
    loser = Want("polca", uuid, Control.SM_CLOCK, Interval(1300, 1410), WantClass.POLICY, "latency")
    setpoint = Setpoint(uuid, Control.SM_CLOCK, Interval(1200, 1200), "lease-1", "fine-tuning", (want, loser),
                        (_refusal(loser),))  # fmt: skip
    control = api.ControlExplain(
        Control.SM_CLOCK, True, "", None, Interval(210, 1410), None, setpoint,
        outcome(uuid, api.WantSpec(Control.SM_CLOCK, 1200, 1200)), "lease-1",
    )  # fmt: skip
    absent = api.ControlExplain(Control.MEMORY_CLOCK, False, "one clock only", None, None, None, None, None, None)
    event = Event(4, 1, 1_790_000_000_000_000_000, "lease_granted", uuid, "lease-1", "sm_clock 1200 MHz")
    return api.Explain(uuid, UUIDS.index(uuid), "NVIDIA A100-SXM4-80GB", "up", reading(0, uuid=uuid), ("sw_power_cap",),
                       (control, absent), (), (event,), (plan_view(uuid),))  # fmt: skip


def plan_view(uuid: str) -> api.PlanView:
    return api.PlanView("perseus-7", "lease-1", uuid, PlanState.RUNNING, 48, 120, 17, 1200, 5777, number=9)


def _refusal(want: Want) -> Any:
    from powerd.model import Refusal

    return Refusal(want, "would empty 1200-1200 MHz of lease lease-1")


def job(**changes: Any) -> api.JobView:
    view = api.JobView(
        job="4711", state="running", begin_wall_ns=1_790_000_000_000_000_000, end_wall_ns=None, steps=1200, lost_steps=40,
        time_s=3.21, energy_j=4_960_000.0, energy_per_retained_step_j=4133.3, saving_fraction=0.142, plan="p-12", gpus=UUIDS,
        unmeasured_steps=2, checkpoints=3, checkpoint_time_s=41.0, checkpoint_energy_j=9000.0, exceptions=1,
        last_detail="NCCL timeout",
    )  # fmt: skip
    return replace(view, **changes)


def replica(**changes: Any) -> ReplicaView:
    view = ReplicaView(
        id="r0123456789ab", name="chat-0", pool="chat", tp=2, gpus=UUIDS, state="fresh", clock_mhz=1110,
        reason="least power that keeps TTFT and TBT", slo=SloSpec(0.5, 0.1), within_slo=True, running=12, waiting=1,
        kv_used_ratio=0.42, requests_per_s=3.5, prompt_tokens_per_s=3600.0, output_tokens_per_s=450.0, ttft_p50_s=0.1,
        ttft_p99_s=0.25, tbt_p50_s=0.025, tbt_p99_s=0.05, preemptions=0, age_s=0.4, power_w=512.0, energy_j=7680.0,
        energy_window_s=15.0, window_s=15.0, engine="vllm", profile="llama2-70b_a100", user="serve",
    )  # fmt: skip
    return replace(view, **changes)


class FakeDaemon:
    """Serves until closed; ``fault`` turns every answer into garbage, silence, dripping or an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "powerd.sock"
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []
        self.leases: dict[str, api.LeaseView] = {}
        self.attached: dict[str, socket.socket] = {}
        self.attach_count = 0
        self.verdict = Verdict.APPLIED
        self.refuse = False
        self.node = node()
        self.fault: Callable[[web.Request], Any] | None = None
        self.api_version = "1.0"
        self.changed = threading.Condition()
        self._serial = 0
        self.start()

    # -- life ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(ready)), daemon=True)
        self._thread.start()
        path = self.folder / "attach.sock"
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        assert ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        (self.folder / "attach.sock").unlink(missing_ok=True)
        for connection in list(self.attached.values()):
            with_shutdown(connection)
        self.attached.clear()

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self.socket.unlink(missing_ok=True)
        await web.UnixSite(runner, str(self.socket)).start()
        ready.set()
        await self._stop.wait()
        await runner.cleanup()
        self.socket.unlink(missing_ok=True)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        with self.changed:
            return self.changed.wait_for(condition, timeout_s)

    # -- attach ----------------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attach, args=(connection,), daemon=True).start()

    def _attach(self, connection: socket.socket) -> None:
        hello = json.loads(connection.recv(api.ATTACH_MAX_BYTES))
        view = self.leases.get(hello["lease"])
        if view is None or view.token != hello["token"]:
            error = api.ErrorView("lease_lost", "this lease has ended", "acquire it again", "request")
            connection.sendall(json.dumps({"error": encode(error)}).encode())
            connection.close()
            return
        connection.sendall(json.dumps(encode(replace(view, token=None))).encode())
        with self.changed:
            self.attached[view.id] = connection
            self.attach_count += 1
            self.changed.notify_all()
        while True:
            try:
                if not connection.recv(4096):
                    break
            except OSError:
                break
        with self.changed:
            if self.attached.get(view.id) is connection:
                del self.attached[view.id]
                self.leases.pop(view.id, None) if self._listener.fileno() >= 0 else None
            self.changed.notify_all()

    # -- HTTP ------------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        with self.changed:
            self.requests.append((request.method, request.path, body, dict(request.headers)))
            self.changed.notify_all()
        if self.fault is not None:
            answer = self.fault(request)
            faulty: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
            return faulty
        result = self._answer(request, body)
        if isinstance(result, web.StreamResponse):
            return result
        if request.path == "/v1/stream":
            return await self._stream(request)
        return web.json_response(encode(result), headers={api.API_HEADER: self.api_version})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", api.API_HEADER: self.api_version})
        await response.prepare(request)
        event = Event(9, 1, 1, "drift", UUIDS[0], "sm_clock", "someone else")
        for name, value in (("heartbeat", {}), ("snapshot", encode(snapshot())), ("news", {"x": 1}), ("event", encode(event))):
            await response.write(f"id: 1\nevent: {name}\ndata: {json.dumps(value)}\n\n".encode())
        return response

    def error(self, status: int, code: str, message: str, hint: str = "do something") -> web.Response:
        view = api.ErrorView(code, message, hint, "request")
        return web.json_response({"error": encode(view)}, status=status, headers={api.API_HEADER: self.api_version})

    def _answer(self, request: web.Request, body: Any) -> Any:
        method, parts = request.method, request.path.strip("/").split("/")
        if parts[0] in ("healthz",):
            return api.Ack()
        if parts[0] == "metrics":
            return web.Response(text="powerd_gpu_up 1\n")
        if parts[0] == "openapi.json":
            return {"openapi": "3.1.0"}
        match parts[1:]:
            case ["node"]:
                return self.node
            case ["snapshot"]:
                return snapshot()
            case ["stream"]:
                return None
            case ["explain", uuid]:
                return explain(uuid)
            case ["history"]:
                series = api.HistorySeries(UUIDS[0], 60.0, (0.0, 60.0, 120.0), {"power_w": (300.0, None, 310.0)})
                return api.HistoryView("minute", 0.0, 180.0, (series,))
            case ["events"]:
                return (Event(4, 1, 1_790_000_000_000_000_000, "lease_granted", UUIDS[0], "lease-1", "sm_clock 1200 MHz"),)
            case ["leases"] if method == "GET":
                return tuple(replace(v, token=None) for v in self.leases.values())
            case ["leases"]:
                return self._grant(decode(api.LeaseRequest, body))
            case ["leases", name, *_] if name not in self.leases:
                return self.error(410, "lease_lost", f"lease {name} has ended")
            case ["leases", name] if method == "PATCH":
                change = decode(api.LeaseChange, body)
                view = self.leases[name]
                outcomes = tuple(outcome(u, w, self.verdict) for u in view.gpus for w in change.wants)
                self.leases[name] = replace(view, wants=change.wants, outcomes=outcomes)
                return replace(self.leases[name], token=None)
            case ["leases", name] if method == "DELETE":
                with self.changed:
                    view = self.leases.pop(name)
                    self.changed.notify_all()
                return replace(view, state=LeaseState.ENDED, end=LeaseEnd.RELEASED, token=None)
            case ["leases", name, *_]:
                return replace(self.leases[name], token=None)
            case ["windows"]:
                begin = decode(api.WindowBegin, body)
                return api.WindowView("w1", begin.name, begin.job, 1_000_000_000, None, None)
            case ["windows", name, "end"]:
                figure = api.EnergyFigure(UUIDS[0], 1234.5, 1230.0, 1239.0, 308.6, "counter", (1,))
                return api.WindowView(name, "step", None, 1_000_000_000, 5_000_000_000, 4.0, (figure,))
            case ["replicas"]:
                gone = replica(
                    id="rba9876543210", name="code-0", pool="code", tp=1, gpus=UUIDS[:1], state="stale", clock_mhz=None,
                    reason="metrics are 5 s old: no answer in time", within_slo=None, running=None, waiting=None,
                    ttft_p99_s=None, tbt_p99_s=None, power_w=None, energy_j=None, note="no answer in time",
                )  # fmt: skip
                return (replica(), gone)
            case ["jobs"]:
                return (job(), job(job="idle", state="silent", plan=None, saving_fraction=None, lost_steps=0))
            case ["jobs", name]:
                return job(job=name) if name == "4711" else self.error(404, "not_found", f"no job {name!r}")
            case ["jobs", _, "steps"]:
                return tuple(
                    JobStepRow("4711", 0, i, 10**9 * i, 10**9 * i, 10**9 * i + 9 * 10**8, 0.9, 400.0, 1200.0, None, UUIDS)
                    for i in range(3)
                )
            case ["node", "load"]:
                return HostLoad(
                    1_790_000_000_000_000_000, 0.25, 3.5, 8 << 30, 64 << 30, (GpuProcess(UUIDS[0], 4242, "ada", "python"),)
                )
            case ["history", "node"]:
                return ()
            case ["history", "leases"]:
                return (
                    LeaseRow("lease-1", 1_790_000_000_000_000_000, "ended", "released", 1000, "4711", "fine-tuning", UUIDS[:1]),
                )
            case ["jobs", name, "events"]:
                return api.Ack(True, f"{decode(api.JobEvent, body).kind} of job {name}")
            case ["energy", "spans"]:
                asked = decode(api.SpansRequest, body)
                label = api.LabelEnergy(asked.spans[0].label, len(asked.spans), 0.5, 150.0, 148.0, 152.0, ("sw_power_cap",), 1200)
                return api.SpansView(asked.uuid, (label,), 12, "counter")
            case ["perseus", "plan"]:
                return {"deadline_s": 1.0, "clocks": []}
            case ["panic"] | ["resume"] | ["quiesce"]:
                return api.Ack(True, f"{parts[1]}: 2 GPUs")
        return self.error(404, "not_found", f"no {request.path}")

    def _grant(self, request: api.LeaseRequest) -> Any:
        if not self.node.control:
            return self.error(403, "monitor_only", "powerd only monitors here", "set control = true")
        self._serial += 1
        refused = tuple(api.RefusalView(u, w.control, "lease-0 holds less") for u in request.gpus for w in request.wants)
        view = api.LeaseView(
            id=f"lease-{self._serial}", state=LeaseState.ACTIVE, want_class=WantClass.LEASE, uid=1000, user="ada", pid=4242,
            gpus=request.gpus, wants=request.wants, reason=request.reason, job=request.job, detached=request.detached,
            ttl_s=request.ttl_s or 60.0, expires_in_s=request.ttl_s or 60.0, age_s=0.0,
            outcomes=() if self.refuse else tuple(outcome(u, w, self.verdict) for u in request.gpus for w in request.wants),
            refused=refused if self.refuse else (), token=None if request.dry_run else f"secret-{self._serial}",
            dry_run=request.dry_run,
        )  # fmt: skip
        if not request.dry_run:
            self.leases[view.id] = view
        return view


def with_shutdown(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
