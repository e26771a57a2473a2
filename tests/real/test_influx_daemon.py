"""powerd itself, on a simulated node, writing to the real engine: what it measured is what the database says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import LiveNode, wait_for
from tests.real.front import Front
from tests.real.servers import Influxd

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("influx")]

BUCKET = "daemon"
WINDOW_S = 70  # of the node's time, which runs ten times as fast as ours


def section(url: str, folder: Path, more: str = "", bucket: str = BUCKET) -> str:
    token = folder / "token"
    token.write_text("the-right-token\n")
    token.chmod(0o600)
    return f'[influx]\nurl = "{url}"\norg = "o"\nbucket = "{bucket}"\ntoken_file = "{token}"\nsample_hz = 10\n{more}'


@pytest.fixture(scope="module")
def live(influxd: Influxd, influx_front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    influxd.create(BUCKET)
    with LiveNode(time="x10", more=section(influx_front.url, tmp_path_factory.mktemp("token"))) as node:
        yield node


def test_the_integral_at_the_server_is_the_daemons_energy_window(live: LiveNode, influxd: Influxd) -> None:
    """Within 1 % over more than 60 s, by the power's integral there and by the difference of the counter there."""
    with live.load(0, 0.6):
        wait_for("the load draws power", lambda: (live.client.snapshot().readings[0].power_mw or 0) > 150_000)
        window = live.client.window_begin("all")
        began = live.client.snapshot()
        wait_for("the window is long enough", lambda: live.client.snapshot().time_ns > began.time_ns + WINDOW_S * 10**9, 60)
        ended = live.client.window_end(window.id)
    assert ended.end_ns is not None
    assert ended.end_ns - ended.begin_ns >= 60 * 10**9
    offset_ns = began.wall_ns - began.time_ns
    begin_ns, end_ns = ended.begin_ns + offset_ns, ended.end_ns + offset_ns
    newest = f"select last(energy_joules) from gpu where time > {end_ns + 10**9}"
    wait_for("all points of the window are there", lambda: influxd.value(newest, BUCKET), 30)
    for figure in ended.figures:
        assert figure.energy_j
        where = f"from gpu where uuid = '{figure.uuid}' and time >= {begin_ns} and time <= {end_ns}"
        integral = influxd.value(f"select integral(power_watts, 1s) {where}", BUCKET)
        assert integral == pytest.approx(figure.energy_j, rel=0.01)
        spread = influxd.value(f"select spread(energy_joules) {where}", BUCKET)
        assert spread == pytest.approx(figure.energy_j, rel=0.01)


def test_leases_and_events_and_jobs_arrive(live: LiveNode, influxd: Influxd) -> None:
    made = live.powerctl(
        "lease", "acquire", "--gpus", "1", "--power-limit", "300W", "--reason", 'why, "so"', "--job", "j 1", "--json"
    )
    assert made.code == 0, made.err
    live.powerctl("lease", "release", made.json()["id"])
    ended = "select lease, reason, high_power_limit_watts, job from lease where state = 'ended'"
    (series,) = wait_for_series(influxd, ended)
    row = dict(zip(series["columns"], series["values"][-1], strict=True))
    assert (row["lease"], row["reason"], row["high_power_limit_watts"], row["job"]) == (
        made.json()["id"],
        'why, "so"',
        300.0,
        "j 1",
    )
    wait_for_series(influxd, "select detail from event where kind = 'lease_granted'")
    now = live.client.snapshot().time_ns
    step = {"step": 3, "begin_ns": now - 10**9, "end_ns": now, "gpus": [live.uuids[0]], "energy_j": 250.5}
    told = live.http("POST", "/v1/jobs/train/events", {"kind": "step", "steps": [step]}, Content_Type="application/json")
    assert told.code == 200, told.out
    (series,) = wait_for_series(
        influxd, "select step, step_energy_joules, step_seconds from job where job = 'train' and step = 3"
    )
    assert series["values"][0][1:] == [3, 250.5, 1.0]


def test_pools_of_replicas_arrive(live: LiveNode, influxd: Influxd) -> None:
    """Ten seconds of the node's time; its engine is not there, so that only what the GPUs tell is known."""
    asked = {"name": "a", "pool": "chat", "gpus": live.uuids[:1], "metrics_url": "http://127.0.0.1:9/metrics", "tp": 4,
             "slo": {"ttft_s": 1.0, "tbt_s": 0.1}, "detached": True}  # fmt: skip
    told = live.http("POST", "/v1/replicas", asked)
    assert told.code == 200, told.out
    asked_for = "select replicas, tensor_parallel, energy_joules from inference where energy_joules > 0"
    (series,) = wait_for_series(influxd, asked_for)
    live.http("DELETE", f"/v1/leases/{told.json()['lease']['id']}")
    row = dict(zip(series["columns"], series["values"][-1], strict=True))
    assert (row["replicas"], row["tensor_parallel"]) == (1, 4)
    assert influxd.query("select ttft_p99_seconds from inference", BUCKET) == [], "unknown is absent, never 0"


def wait_for_series(influxd: Influxd, query: str) -> list[dict[str, list[Any]]]:
    """The answer to a query as soon as there is one."""
    found: list[dict[str, list[Any]]] = []

    def ask() -> bool:
        found[:] = influxd.query(query, BUCKET)
        return bool(found)

    wait_for(query, ask)
    return found


def test_the_daemon_goes_on_and_says_so_while_the_server_refuses(live: LiveNode, influx_front: Front) -> None:
    def page() -> dict[str, float]:
        lines = live.http("GET", "/metrics").out.splitlines()
        return {name: float(value) for name, value in (text.rsplit(" ", 1) for text in lines if not text.startswith("#"))}

    wait_for("points arrive", lambda: page()["powerd_influx_lines_total"] > 100)
    assert page()["powerd_influx_up"] == 1
    right, influx_front.token = influx_front.token, "another"
    try:
        wait_for("it is told", lambda: page()["powerd_influx_up"] == 0)
        assert page()['powerd_influx_errors_total{status="401"}'] >= 1
        health = live.http("GET", "/healthz")
        assert health.code == 200
        assert "InfluxDB does not take points" in health.out
        assert "401" in health.out
        wait_for("an event", lambda: any(e.kind == "influx_refused" for e in live.client.events()))
        before = page()["powerd_spool_points"]
        wait_for("the spool grows", lambda: page()["powerd_spool_points"] > before + 50)
        assert live.powerctl("set", "0", "--for", "1m", "--power-limit", "300W", "--reason", "x").code in (0, 3)
    finally:
        influx_front.token = right
