"""powerd under a real systemd: installed as users install it, on a simulated node, killed and stopped in every way.

House rules: what the GPUs are set to is read from the simulated driver's own truth, never from powerd; every test starts from
running units at baseline and says what it does to them; nothing waits for a time where it can wait for a state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.real import nspawn
from tests.real.nspawn import PREFIX, SHARED, Container

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("systemd"), pytest.mark.timeout(600)]

GPUS = 2
POWERCTL = f"{PREFIX}/bin/powerctl"
SIM = f"{PREFIX}/bin/powerd sim"
NODE = f"{SHARED}/node"
SIM_ENVIRONMENT = f"--setenv=TMPDIR={NODE} --setenv=XDG_CACHE_HOME={SHARED}/cache"
ALL = "powerd.socket powerd-attach.socket powerd.service powerd-hw.service"
SERVICES = ("powerd.service", "powerd-hw.service")
# A want that no A100 has by itself: both the limit and the lock are visible in the driver's truth.
LIMIT_W, CLOCK_MHZ = 300, 1200
# What a fresh a100-sxm-500w has, with its clocks unlocked.
BASELINE_W = 500
SETTINGS = f"--power-limit {LIMIT_W}W --sm-clock {CLOCK_MHZ}MHz"
Truth = list[tuple[int, list[int] | None]]

DROP_IN = """
[Service]
Environment="LD_LIBRARY_PATH={library}" "POWERD_SIM_STATE={state}"
ReadWritePaths={shared}
# Short, so that a test of the watchdog need not wait for minutes.
WatchdogSec=5
TimeoutAbortSec=1
"""


# Reads the truth like `powerd sim show --json`, in one process until it is as wanted, and prints the last that it saw.
LOOK = """
import json, sys, time
from powerd.sim.node import attach
wanted, until = json.loads(sys.argv[1]), time.monotonic() + float(sys.argv[2])
with attach() as node:
    while True:
        found = [[gpu["limit_mw"], gpu["locked_clocks_mhz"]] for gpu in node.show()["gpus"]]
        if wanted in (None, found) or time.monotonic() > until:
            break
        time.sleep(0.05)
print(json.dumps(found))
"""


def truth(container: Container, wanted: Truth | None = None, timeout_s: float = 0) -> Truth:
    """Per GPU the power limit in mW and the locked clocks, from the simulated driver itself."""
    arguments = f"'{json.dumps(wanted)}' {timeout_s}"
    look = container.run(f". {SHARED}/environment; {nspawn.PYTHON} {SHARED}/look.py {arguments}", timeout_s=timeout_s + 30)
    return [(limit_mw, lock) for limit_mw, lock in json.loads(look.stdout)]


def wait_for(container: Container, wanted: Truth, timeout_s: float = 30) -> None:
    """Wait until the GPUs are set like this; a failure shows what they were set to at the end."""
    assert truth(container, wanted, timeout_s) == wanted


def start_node(container: Container) -> None:
    """A simulated node that lives as long as the container, and the drop-ins through which both units see it."""
    (container.shared / "node").mkdir()
    (container.shared / "cache").mkdir()
    (container.shared / "look.py").write_text(LOOK)
    command = f"{SIM} run --gpus {GPUS} --model a100-sxm-500w --perm root -- sleep infinity"
    container.run(f"systemd-run --quiet --unit=node {SIM_ENVIRONMENT} {command}")
    sleeper = container.wait("pgrep --exact sleep", 20).split()[0]
    found = container.run(f"tr '\\0' '\\n' < /proc/{sleeper}/environ | grep -E '^(LD_LIBRARY_PATH|POWERD_SIM_STATE)='").stdout
    variables = dict(line.split("=", 1) for line in found.splitlines())
    (container.shared / "environment").write_text("".join(f"export {key}={value}\n" for key, value in variables.items()))
    # Both units map the node, and powerd is not root.
    container.run(f"chmod -R a+rwX {NODE}; chmod -R a+rX {SHARED}/cache; chmod a+rw {variables['POWERD_SIM_STATE']}")
    text = DROP_IN.format(library=variables["LD_LIBRARY_PATH"], state=variables["POWERD_SIM_STATE"], shared=NODE)
    for unit in SERVICES:
        container.write(f"/etc/systemd/system/{unit}.d/simulated.conf", text)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted machine with powerd installed by `powerctl service install` and a simulated node."""
    nspawn.require()
    shared = tmp_path_factory.mktemp("systemd") / "shared"
    shared.mkdir()
    with nspawn.booted(shared) as container:
        container.install_powerd()
        container.run(f"{POWERCTL} service install")
        start_node(container)
        container.write("/etc/powerd/powerd.d/control.toml", "[daemon]\ncontrol = true\n")
        container.run("systemctl daemon-reload")
        yield container


@pytest.fixture
def node(machine: Container) -> Iterator[Container]:
    """Both units running and answering; afterwards everything is stopped and forgotten."""
    machine.run("systemctl start powerd.service", timeout_s=90)
    machine.wait(f"{POWERCTL} status --json")
    yield machine
    machine.run("systemctl stop job.service", check=False, timeout_s=120)
    machine.run(f"systemctl stop {ALL}", check=False, timeout_s=120)
    machine.run("systemctl reset-failed; rm -rf /var/lib/powerd/*", check=False)
    machine.run("rm -f /etc/systemd/system/*.d/test.conf /etc/powerd/powerd.d/test.toml; systemctl daemon-reload")


@pytest.fixture
def baseline(node: Container) -> Truth:
    """What the GPUs are set to before anybody wants anything."""
    wanted: Truth = [(BASELINE_W * 1000, None)] * GPUS
    wait_for(node, wanted)
    return wanted


@pytest.fixture
def leased(node: Container, baseline: Truth) -> Truth:
    """A job that holds a lease on every GPU; what they are set to on its behalf."""
    start = "systemd-run --quiet --collect --unit=job --property=TimeoutStopSec=3"
    node.run(f"{start} {POWERCTL} run {SETTINGS} --gpus all -- sleep 86399")
    # Its command runs: the lease was answered and attached.
    node.wait("pgrep --full --exact 'sleep 86399'")
    wanted: Truth = [(LIMIT_W * 1000, [CLOCK_MHZ, CLOCK_MHZ])] * GPUS
    wait_for(node, wanted)
    return wanted


def restarts(container: Container, unit: str) -> int:
    return int(container.show(unit, "NRestarts"))


def wait_restarted(container: Container, unit: str, before: int, timeout_s: float = 30) -> None:
    """Wait until systemd has started the unit again and it has said that it is ready."""
    container.wait(f"test $(systemctl show -P NRestarts {unit}) -gt {before} && systemctl is-active {unit}", timeout_s)


def status_of(container: Container, unit: str, field: str) -> str:
    """A line of /proc/PID/status of the unit's main process."""
    text = container.run(f"cat /proc/{container.show(unit, 'MainPID')}/status").stdout
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{field}:"))


def test_both_units_start_and_status_answers_everybody(node: Container) -> None:
    for unit in SERVICES:
        assert node.show(unit, "ActiveState") == "active"
    for user in (None, "nobody"):
        answer = json.loads(node.run(f"{POWERCTL} status --json", user=user).stdout)
        assert len(answer["node"]["gpus"]) == GPUS
        assert answer["node"]["hw_connected"] is True


def test_privileges_are_those_that_were_promised(node: Container) -> None:
    assert status_of(node, "powerd.service", "Uid").split()[0] == node.run("id -u powerd").stdout.strip()
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(status_of(node, "powerd.service", kind), 16) == 0, kind
    cap_sys_admin = 1 << 21
    assert int(status_of(node, "powerd-hw.service", "CapEff"), 16) == cap_sys_admin
    assert status_of(node, "powerd-hw.service", "NoNewPrivs") == "1"
    hw, host = (node.run(f"readlink /proc/{pid}/ns/net").stdout for pid in (node.show("powerd-hw.service", "MainPID"), "1"))
    assert hw != host


def test_files_are_where_they_were_promised_and_open_to_whom(node: Container) -> None:
    places = "/run/powerd/powerd.sock /run/powerd/attach.sock /run/powerd-hw /var/lib/powerd /var/lib/powerd-hw"
    found = node.run(f"stat --format='%n %a %U %G' {places}").stdout.splitlines()
    assert found == [
        "/run/powerd/powerd.sock 666 root root",
        "/run/powerd/attach.sock 666 root root",
        "/run/powerd-hw 750 root powerd",
        "/var/lib/powerd 750 powerd powerd",
        "/var/lib/powerd-hw 700 root powerd",
    ]
    assert node.run("test -S /run/powerd-hw/hw.sock", check=False).returncode == 0
    assert node.run("ls /run/powerd-hw", check=False, user="nobody").returncode != 0


def test_a_lease_is_set_and_undone_when_its_job_is_killed(node: Container, baseline: Truth, leased: Truth) -> None:
    assert leased != baseline
    node.run("systemctl kill --signal=KILL job.service")
    wait_for(node, baseline)


def test_powerd_that_is_killed_comes_back_and_the_lease_with_it(node: Container, leased: Truth) -> None:
    before = restarts(node, "powerd.service")
    node.run("systemctl kill --signal=KILL powerd.service")
    wait_restarted(node, "powerd.service", before)
    lease = f"{POWERCTL} lease list --json | grep -q 'powerctl run'"
    node.wait(lease)
    # Longer than the grace in which hw would have given up.
    node.run("sleep 7")
    node.run(lease)
    assert truth(node) == leased
    assert node.show("job.service", "ActiveState") == "active"


def test_powerd_that_stays_away_leaves_baseline(node: Container, baseline: Truth, leased: Truth) -> None:
    node.run("systemctl stop powerd.socket powerd-attach.socket powerd.service")
    wait_for(node, baseline)
    assert node.show("powerd-hw.service", "ActiveState") == "active"


def test_hw_that_is_killed_comes_back_and_is_armed_again(node: Container, leased: Truth) -> None:
    before = restarts(node, "powerd-hw.service")
    node.run("systemctl kill --signal=KILL powerd-hw.service")
    wait_restarted(node, "powerd-hw.service", before)
    wait_for(node, leased)
    node.wait(f"{POWERCTL} status --json | grep -q '\"hw_connected\": true'")


def test_hw_that_is_killed_and_stays_away_has_restored(node: Container, baseline: Truth, leased: Truth) -> None:
    node.write("/etc/systemd/system/powerd-hw.service.d/test.conf", "[Service]\nRestart=no\n")
    # Without powerd nobody could arm it again: what is found is what ExecStopPost left.
    node.run("systemctl daemon-reload && systemctl kill --signal=KILL powerd-hw.service")
    node.wait("systemctl is-failed powerd-hw.service")
    assert truth(node) == baseline


@pytest.mark.parametrize("unit", SERVICES)
def test_the_watchdog_ends_a_process_that_hangs(node: Container, leased: Truth, unit: str) -> None:
    before = restarts(node, unit)
    node.run(f"kill -STOP {node.show(unit, 'MainPID')}")
    wait_restarted(node, unit, before, 40)
    assert "atchdog timeout" in node.run(f"journalctl --no-pager --unit={unit}").stdout
    wait_for(node, leased)


def test_stop_leaves_baseline_while_a_lease_is_held(node: Container, baseline: Truth, leased: Truth) -> None:
    node.run(f"systemctl stop {ALL}", timeout_s=120)
    assert truth(node) == baseline
    for unit in SERVICES:
        assert node.show(unit, "ActiveState") == "inactive", "a clean stop is no failure"


def test_reload_keeps_the_process_and_refuses_a_bad_file(node: Container, leased: Truth) -> None:
    process = node.show("powerd.service", "MainPID")
    node.write("/etc/powerd/powerd.d/test.toml", "[daemon]\ncontrl = true\n")
    node.run("systemctl reload powerd.service")
    node.wait(f"{POWERCTL} status --json | grep -q '\"config_reload_ok\": false'")
    assert node.show("powerd.service", "MainPID") == process
    assert truth(node) == leased


@pytest.mark.parametrize("unit", SERVICES)
def test_a_refused_configuration_is_not_tried_again(node: Container, unit: str) -> None:
    node.run(f"systemctl stop {ALL}", timeout_s=120)
    node.write("/etc/powerd/powerd.d/test.toml", "[daemon]\ncontrl = true\n")
    node.run(f"systemctl start {unit}", check=False, timeout_s=90)
    node.wait(f"systemctl is-failed {unit}")
    assert (node.show(unit, "ExecMainStatus"), restarts(node, unit)) == ("78", 0)
    assert "did you mean 'control'" in node.run(f"journalctl --no-pager --unit={unit}").stdout


def test_the_first_request_starts_powerd(node: Container) -> None:
    node.run("systemctl stop powerd.service")
    node.run("systemctl start powerd.socket powerd-attach.socket")
    assert node.show("powerd.service", "ActiveState") != "active"
    node.wait(f"{POWERCTL} status --json")
    assert node.show("powerd.service", "ActiveState") == "active"


def test_units_as_installed_are_clean_and_well_fenced_in(machine: Container) -> None:
    names = " ".join(f"/etc/systemd/system/{unit}" for unit in ALL.split())
    done = machine.run(f"systemd-analyze verify {names}")
    assert (done.stdout, done.stderr) == ("", "")
    for unit in SERVICES:
        machine.run(f"systemd-analyze security --threshold=25 --no-pager {unit}")


def test_uninstall_stops_restores_and_leaves_what_is_the_operators(node: Container, baseline: Truth, leased: Truth) -> None:
    done = node.run(f"{POWERCTL} service uninstall", timeout_s=120)
    try:
        assert truth(node) == baseline
        assert "/etc/powerd" in done.stdout
        assert node.run("test -e /etc/powerd/powerd.toml -a -d /var/lib/powerd", check=False).returncode == 0
        assert node.run(f"systemctl cat {ALL}", check=False).returncode != 0
    finally:
        node.run(f"{POWERCTL} service install && systemctl daemon-reload")
