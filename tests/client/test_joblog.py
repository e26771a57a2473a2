"""JobLog: what a training job tells of itself, and that it costs training nothing."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from aiohttp import web

from powerd.api import JobEvent, JobStep
from powerd.client import Client, JobLog
from powerd.client.joblog import batches
from tests.client.fake_daemon import UUIDS, FakeDaemon


def told(daemon: FakeDaemon) -> list[dict[str, Any]]:
    return [body for method, path, body, _ in daemon.requests if method == "POST" and path == "/v1/jobs/4711/events"]


def test_what_is_said_arrives_in_order_and_in_batches(daemon: FakeDaemon) -> None:
    with JobLog(Client(), "4711", rank=3, gpus=UUIDS[:1], interval_s=60) as log:
        for number in range(20):
            log.step(number, number * 10, number * 10 + 9, energy_j=5.0, clock_mhz=1200, plan="p")
        log.checkpoint_begin()
        log.checkpoint_end(energy_j=12.0)
        log.restore(7)
        log.step(8, 300, 310)
    events = told(daemon)
    assert [e["kind"] for e in events] == ["start", "step", "checkpoint_begin", "checkpoint_end", "restore", "step", "end"]
    assert [s["step"] for s in events[1]["steps"]] == list(range(20))
    assert events[1]["steps"][3] == {
        "step": 3, "begin_ns": 30, "end_ns": 39, "gpus": [UUIDS[0]], "plan": "p", "energy_j": 5.0, "clock_mhz": 1200.0,
    }  # fmt: skip
    assert {e["rank"] for e in events} == {3}
    assert events[4]["step"] == 7
    assert all(e["time_ns"] > 0 for e in events)
    assert log.dropped == 0


def test_an_exception_ends_the_job_as_failed_and_goes_on(daemon: FakeDaemon) -> None:
    with pytest.raises(ZeroDivisionError), JobLog(Client(), "4711", interval_s=60):
        _ = 1 / 0
    assert [e["kind"] for e in told(daemon)] == ["start", "exception"]
    assert "ZeroDivisionError" in told(daemon)[1]["detail"]


def test_it_sends_by_itself_while_training_goes_on(daemon: FakeDaemon) -> None:
    log = JobLog(Client(), "4711", gpus=UUIDS[:1], interval_s=0.2)
    log.step(1, 0, 1)
    assert daemon.wait(lambda: len(told(daemon)) == 1)
    log.close()


def test_without_a_daemon_nothing_raises_nothing_waits_and_what_is_lost_is_counted(run_folder: Any, caplog: Any) -> None:
    log = JobLog(Client(run_folder / "nobody.sock", on_error="raise"), "4711", gpus=UUIDS[:1], interval_s=60, capacity=10)
    for number in range(25):
        log.step(number, 0, 1)
    assert log.dropped == 15
    begin = time.monotonic()
    log.close()
    assert time.monotonic() - begin < 5
    assert log.dropped == 25
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_a_daemon_that_comes_back_gets_what_was_kept(daemon: FakeDaemon) -> None:
    away = threading.Event()
    away.set()
    daemon.fault = lambda request: web.Response(status=503) if away.is_set() else None
    log = JobLog(Client(), "4711", gpus=UUIDS[:1], interval_s=0.05)
    log.step(1, 0, 1)
    assert daemon.wait(lambda: len(told(daemon)) >= 2), "it tries again"
    daemon.fault = None
    seen = len(told(daemon))
    log.step(2, 2, 3)
    assert daemon.wait(lambda: len(told(daemon)) > seen)
    log.close()
    steps = [s["step"] for e in told(daemon)[seen:] for s in e["steps"]]
    assert steps[:2] == [1, 2]
    assert log.dropped == 0


def test_what_the_daemon_refuses_is_dropped_and_the_rest_goes_on(daemon: FakeDaemon) -> None:
    log = JobLog(Client(), "4711", gpus=UUIDS[:1], interval_s=60)
    daemon.fault = lambda request: daemon.error(422, "bad_value", "no")
    log.note("refused")
    log.close()
    assert log.dropped == 1


def test_a_close_waits_two_seconds_at_most_for_a_daemon_that_hangs(daemon: FakeDaemon) -> None:
    import asyncio

    daemon.fault = lambda request: asyncio.sleep(30, web.Response())
    log = JobLog(Client(), "4711", gpus=UUIDS[:1], interval_s=60)
    log.step(1, 0, 1)
    begin = time.monotonic()
    log.close()
    assert time.monotonic() - begin < 8
    log.close()


def test_a_forked_child_says_nothing(daemon: FakeDaemon) -> None:
    log = JobLog(Client(), "4711", gpus=UUIDS[:1], interval_s=60)
    if (child := os.fork()) == 0:
        log.step(1, 0, 1)
        log.close()
        os._exit(log.dropped)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    log.close()
    assert told(daemon) == []


def test_batches_keep_the_order_and_have_an_end() -> None:
    step = JobEvent("step", steps=(JobStep(1, 0, 1, UUIDS),))
    joined = batches([*[step] * 700, JobEvent("note"), step])
    assert [(e.kind, len(e.steps)) for e in joined] == [("step", 500), ("step", 200), ("note", 0), ("step", 1)]
