"""Whatever a configuration file says wrong, at the start and at a reload: one clear line, and the last good file in force."""

from __future__ import annotations

import pytest

from powerd.client import Lease
from tests.e2e.live import LiveNode, wait_for
from tests.e2e.mistakes import (
    Case,
    assert_one_line,
    config,
)

pytestmark = pytest.mark.xdist_group("bad_input")
CONFIG = [
    config("unknown key", "[daemon]\ncontrl = true\n", "bad.toml:2", "contrl", "did you mean 'control'"),
    config("unknown section", "[deamon]\ncontrol = true\n", "bad.toml:1", "deamon", "did you mean 'daemon'"),
    config("out of range", "[hw]\n\nsample_hz = 5000\n", "bad.toml:3", "hw.sample_hz", "1..100"),
    config("wrong type", '[daemon]\ncontrol = "yes"\n', "bad.toml:2", "daemon.control", "expected bool"),
    config("unknown choice", '[hw]\ndrift = "fight"\n', "bad.toml:2", "fight", "yield, warn, enforce"),
    config("not TOML", "[daemon\ncontrol = true\n", "bad.toml", "line 1"),
    config("bounds reversed", "[limits]\nsm_clock_min_mhz = 1400\nsm_clock_max_mhz = 300\n", "bad.toml", "1400", "300", "above"),
    config("not UTF-8", '[access]\ngroup = "caf\xe9"\n', "bad.toml", "UTF-8"),
    config("writable by others", "[daemon]\ncontrol = true\n", "bad.toml", "others can write", "chmod", mode=0o666),
    config("TCP beyond loopback without TLS", '[tcp]\nlisten = "0.0.0.0:9478"\n', "tcp.certificate"),
    config("TCP address", '[tcp]\nlisten = "localhost"\n', "ADDRESS:PORT"),
    config(
        "token file that everybody reads",
        '[tcp]\nlisten = "127.0.0.1:1"\ntoken_file = "{root}/powerd.toml"\n',
        "token_file",
        "chmod 0600",
    ),
]


@pytest.mark.parametrize("case", CONFIG, ids=lambda case: case.name)
def test_a_mistake_in_the_configuration(case: Case, live: LiveNode, held: Lease) -> None:
    before = live.state()
    answer = case.how(live, held)
    assert_one_line(case, answer, live, held)
    assert live.state() == before


# --- SIGHUP ---


def test_a_bad_file_at_reload_keeps_the_last_good_one_and_says_so(live: LiveNode, held: Lease) -> None:
    before = live.state()
    try:
        live.write_config(live.config_text + "[leases]\nmax_tll_s = 5\n")
        live.reload()
        node = live.client.node()
        assert not node.config_reload_ok
        assert "max_tll_s" in node.config_error
        assert "did you mean 'max_ttl_s'" in node.config_error
        status = live.powerctl("status")
        assert status.code == 0
        assert "max_tll_s" in status.out + status.err, "status says that the file was refused"
        assert live.powerctl("set", "0", "--for", "10m", "--sm-clock", "1200MHz", "--dry-run").code == 0, (
            "the old bound is in force"
        )
        live.write_config(live.config_text + "[leases]\nmax_ttl_s = 5\n", mode=0o666)
        live.reload()
        assert "others can write" in live.client.node().config_error
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert live.client.node().config_reload_ok
    assert live.state() == before


def test_a_good_file_at_reload_takes_effect(live: LiveNode, held: Lease) -> None:
    before = live.state()
    wish = ("set", "0", "--for", "10m", "--sm-clock", "1200MHz", "--dry-run")
    assert live.powerctl(*wish).code == 0
    try:
        live.write_config(live.config_text + "[leases]\nmax_ttl_s = 5\n")
        live.reload()
        refused = live.powerctl(*wish)
        assert refused.code == 2
        assert "0..5" in refused.lines[0]
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert live.powerctl(*wish).code == 0
    assert live.state() == before


def test_a_key_that_waits_for_a_restart_is_named_by_the_reload(live: LiveNode) -> None:
    before, said = live.state(), "takes effect at the next start: influx.url, influx.bucket"
    seen = max(e.seq for e in live.client.events())

    def details() -> list[str]:
        return [e.detail for e in live.client.events(since=seen) if e.kind == "config_reloaded"]

    try:
        influx = '[influx]\nurl = "http://127.0.0.1:9"\nbucket = "new"\n[leases]\nmax_ttl_s = 50\n'
        live.write_config(live.config_text + influx)
        live.reload()
        assert said in details()
        seen = max(e.seq for e in live.client.events())
    finally:
        live.write_config(live.config_text)
        live.reload()
    assert details(), "it was reloaded"
    assert said not in details(), "it is as powerd was started with"
    assert live.state() == before


def test_another_sampling_rate_at_reload_is_the_node_s_and_energy_s_too() -> None:
    with LiveNode(gpus=1) as live:
        live.write_config(live.config_text.replace("[hw]\n", "[hw]\nsample_hz = 20\n"))
        live.reload()
        assert live.client.node().sample_hz == 20
        first = live.client.snapshot()
        wait_for("twenty samples", lambda: live.client.snapshot().seq >= first.seq + 20)
        last = live.client.snapshot()
        assert (last.time_ns - first.time_ns) / 1e9 / (last.seq - first.seq) < 0.09, "sampled more often than ten times a second"
        with live.client.energy("after", live.uuids) as window:
            wait_for("samples", lambda: live.client.snapshot().seq >= last.seq + 20)
        assert window.energy_j is not None


def test_control_taken_away_at_reload_undoes_every_setting() -> None:
    with LiveNode(gpus=1) as live:
        live.client.lease(live.uuids, power_limit_w=300, reason="until control goes", ttl_s=600, detached=True)
        assert live.node.view(0).limit_mw == 300_000
        live.write_config(live.config_text.replace("control = true", "control = false"))
        live.reload()
        wait_for("the limit is undone", lambda: live.node.view(0).limit_mw == 500_000)
        assert live.client.leases() == ()
        assert not live.client.node().control
