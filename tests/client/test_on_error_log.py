"""With ``on_error="log"`` nothing ever raises into a training step, whatever the daemon does."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerd.api import LeaseRequest
from powerd.client import Client
from powerd.model import ClockPlan
from tests.client.fake_daemon import UUIDS, FakeDaemon

PLAN = ClockPlan("p", UUIDS[0], (1200,), None, 1.0)


def use_lease(client: Client) -> Any:
    with client.lease([0], sm_clock_mhz=1200) as lease:
        lease.change(sm_clock_mhz=1100)
        lease.renew()
        lease.plans()
        with lease.arm(PLAN) as beats:
            beats.send(0, 0)
            beats.safe()
    return lease


def use_window(client: Client) -> Any:
    with client.energy("step", [0]) as window:
        pass
    return window


METHODS: dict[str, Callable[[Client], Any]] = {
    "healthz": lambda c: c.healthz(), "metrics": lambda c: c.metrics(), "openapi": lambda c: c.openapi(),
    "node": lambda c: c.node(), "snapshot": lambda c: c.snapshot(), "stream": lambda c: list(c.stream()),
    "explain": lambda c: c.explain(0), "history": lambda c: c.history([0]), "events": lambda c: c.events(),
    "leases": lambda c: c.leases(), "lease_view": lambda c: c.lease_view("x"), "panic": lambda c: c.panic(),
    "lease_create": lambda c: c.lease_create(LeaseRequest((), (), "x")),
    "lease_change": lambda c: c.lease_change("x", ()), "lease_renew": lambda c: c.lease_renew("x"),
    "lease_release": lambda c: c.lease_release("x"), "quiesce": lambda c: c.quiesce(), "resume": lambda c: c.resume(),
    "window_begin": lambda c: c.window_begin([0]), "window_end": lambda c: c.window_end("x"),
    "plans": lambda c: c.plans("x"), "plan_arm": lambda c: c.plan_arm("x", PLAN),
    "plan_disarm": lambda c: c.plan_disarm("x", "p"),
    "lease": use_lease, "energy": use_window, "wrong value": lambda c: c.lease([0], sm_clock_mhz=-3),
}  # fmt: skip


def test_every_public_method_is_in_this_list() -> None:
    ours = {"close", "guard", "warn", "transport", "killpoint", "resolve", "time_scale"}
    assert {n for n in vars(Client) if not n.startswith("_")} - ours == METHODS.keys() - {"wrong value"}


def slowly(request: web.Request) -> Any:
    async def drip() -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    return drip()


def silence(request: web.Request) -> Any:
    async def hang() -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    return hang()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", [slowly, silence])
def test_a_slow_daemon(daemon: FakeDaemon, method: str, fault: Any, caplog: pytest.LogCaptureFixture) -> None:
    client: Any = Client(on_error="log", timeout_s=0.05)
    client._transport.timeout_s = 0.05
    client._wait = lambda wait_s: 0.05
    daemon.fault = fault
    METHODS[method](client)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_daemon_costs_one_warning(run_folder: Path, method: str, caplog: pytest.LogCaptureFixture) -> None:
    client = Client(run_folder / "none.sock", on_error="log")
    for _ in range(3):
        METHODS[method](client)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the job goes on without it" in warnings[0].getMessage()


BODIES = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "gpus", "error", "code", "token", "wants", "figures", "readings"]), inner),
        max_leaves=8,
    ),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, status=st.sampled_from([200, 204, 301, 400, 410, 418, 500, 503]), method=st.sampled_from(sorted(METHODS)))
def test_garbage_from_the_daemon(daemon: FakeDaemon, body: Any, status: int, method: str) -> None:
    import json

    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    daemon.fault = lambda request: web.Response(body=content, status=status)
    METHODS[method](Client(on_error="log", timeout_s=2))


def test_neutral_results_say_that_nothing_is_known(run_folder: Path) -> None:
    client = Client(run_folder / "none.sock", on_error="log")
    assert client.snapshot().readings == ()
    assert math.isnan(client.snapshot().age_s)
    assert client.node().control is False
    assert client.healthz().ok is False
    lease = use_lease(client)
    assert (lease.held, lease.outcomes, lease.lost_reason) == (False, (), "never granted")
    assert use_window(client).energy_j is None


def test_the_callers_own_exceptions_still_come_through(run_folder: Path) -> None:
    client = Client(run_folder / "none.sock", on_error="log")
    with pytest.raises(KeyError), client.lease([0], sm_clock_mhz=1200), client.energy("x", [0]):
        raise KeyError


def test_a_token_file_that_is_missing_does_not_stop_a_job() -> None:
    client = Client(url="https://127.0.0.1:1", token_file="/nowhere", on_error="log")
    assert client.snapshot().readings == ()


def test_trouble_that_ends_is_warned_of_again_when_it_returns(daemon: FakeDaemon, caplog: pytest.LogCaptureFixture) -> None:
    client: Any = Client(on_error="log")
    for fault in (silence, None, silence):
        client._transport.timeout_s = 0.05 if fault else 5.0
        daemon.fault = fault
        client.snapshot()
    assert [r.levelno for r in caplog.records].count(logging.WARNING) == 2
    assert UUIDS[0] in client.resolve([UUIDS[0]])
