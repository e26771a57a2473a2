"""powerd-hw as powerd sees it: set, verify, limits, ends of settings, trouble with GPUs, drivers and callers."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from powerd.hw import frames
from powerd.hw.frames import Command, Table
from powerd.hw.tables import capabilities_of, processes_of
from powerd.model import Control, Health, Interval, Verdict
from tests.hw.rig import PATIENCE_S, Powerd, Rig

LIMIT, LOCK = Interval(400_000, 400_000), Interval(1200, 1200)
MakeRig = Callable[..., Rig]


def watts(value: int) -> Interval:
    return Interval(value * 1000, value * 1000)


def served(rig: Rig) -> Powerd:
    rig.serve()
    return rig.connect()


def truth_until(rig: Rig, condition: Callable[[], bool]) -> None:
    """For what no frame announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, rig.node.show()
        threading.Event().wait(0.01)


# set and verify


def test_limit_is_set_read_back_and_reported_with_every_moment(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.accepted, outcome.enforced) == (Verdict.APPLIED, LIMIT, 400_000)
    assert 0 < outcome.received_ns <= outcome.called_ns <= outcome.returned_ns <= outcome.verified_ns
    assert rig.truth(0)["limit_mw"] == 400_000
    assert rig.truth(1)["limit_mw"] == 700_000


def test_clock_lock_waits_for_load_and_is_then_confirmed(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.PENDING_LOAD)
    with rig.load(0):
        outcome = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
    assert outcome.observed is not None
    assert abs(outcome.observed - 1200) <= 20


def test_a_clock_held_down_by_something_else_says_by_what(rig: Rig) -> None:
    powerd = served(rig)
    with rig.load(0):
        rig.node.fault("hw-thermal", 0)
        seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, Interval(1800, 1800)))
        outcome = powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.OVERRIDDEN)
        assert "hw_thermal_slowdown" in outcome.detail
        rig.node.clear_faults(0)
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)


def test_an_out_of_band_cap_is_overridden_not_applied(rig: Rig) -> None:
    rig.node.fault("oob-cap", 0, value=350_000)
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.enforced) == (Verdict.OVERRIDDEN, 350_000)
    assert "out of band" in outcome.detail


def test_the_same_table_twice_is_no_second_driver_call(rig: Rig) -> None:
    powerd = served(rig)
    rows = ((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[0], Control.SM_CLOCK, LOCK))
    first = powerd.desire(*rows)
    powerd.outcome(first, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(first, rig.uuids[0], Control.SM_CLOCK)
    calls = rig.truth(0)["setter_calls"]
    second = powerd.desire(*rows)
    assert powerd.outcome(second, rig.uuids[0], Control.POWER_LIMIT).verdict is Verdict.APPLIED
    powerd.outcome(second, rig.uuids[0], Control.SM_CLOCK)
    assert rig.truth(0)["setter_calls"] == calls == 2


def test_a_row_that_asks_for_baseline_where_nothing_was_set_is_answered_without_a_driver_call(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, None))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.requested) == (Verdict.APPLIED, None)
    assert rig.truth(0)["setter_calls"] == 0


def test_the_limit_found_before_the_first_write_is_the_baseline(rig: Rig) -> None:
    rig.node.fault("foreign-limit", 0, value=550_000)
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert rig.truth(0)["limit_mw"] == 550_000


def test_a_declared_baseline_stands_over_what_was_found(rig: Rig) -> None:
    rig.configure(extra="[baseline]\npower_limit_w = 600\nsm_clock_min_mhz = 210\nsm_clock_max_mhz = 1500")
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[0], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK)
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["locked_clocks_mhz"]) == (600_000, [210, 1500])


@pytest.mark.parametrize(
    ("wish", "accepted"),
    [(watts(900), watts(500)), (watts(100), watts(300)), (watts(450), watts(450))],
)
def test_the_sites_limits_hold_whatever_powerd_asks(rig: Rig, wish: Interval, accepted: Interval) -> None:
    rig.configure(extra="[limits]\npower_limit_min_w = 300\npower_limit_max_w = 500")
    powerd = served(rig)
    outcome = powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, wish)), rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.requested, outcome.accepted) == (Verdict.APPLIED, wish, accepted)
    assert rig.truth(0)["limit_mw"] == accepted.high


def test_baseline_is_clipped_to_the_sites_limits(rig: Rig) -> None:
    rig.configure(extra="[limits]\npower_limit_max_w = 500")
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert rig.truth(0)["limit_mw"] == 500_000


def test_a_step_down_waits_for_the_dwell_and_a_step_up_does_not(rig: Rig) -> None:
    powerd = served(rig)
    uuid = rig.uuids[0]
    powerd.outcome(powerd.desire((uuid, Control.POWER_LIMIT, watts(600))), uuid, Control.POWER_LIMIT)
    held = powerd.desire((uuid, Control.POWER_LIMIT, watts(300)), dwell_ms=60_000)
    up = powerd.desire((uuid, Control.POWER_LIMIT, watts(650)), dwell_ms=60_000)
    assert powerd.outcome(up, uuid, Control.POWER_LIMIT).enforced == 650_000
    assert not [o for o in powerd.outcomes if o.seq == held and o.verdict is Verdict.APPLIED]
    down = powerd.desire((uuid, Control.POWER_LIMIT, watts(300)), dwell_ms=200)
    outcome = powerd.outcome(down, uuid, Control.POWER_LIMIT)
    assert outcome.enforced == 300_000


# what a GPU can do


def test_capabilities_say_per_control_what_can_be_used_and_why_not(make_rig: MakeRig) -> None:
    rig = make_rig(model="a100-sxm-400w", gpus=1)
    powerd = served(rig)
    capabilities = capabilities_of(powerd.until(lambda: powerd.tables.get(Table.CAPABILITIES))[0])
    assert capabilities.simulated
    assert capabilities.interval(Control.POWER_LIMIT) is not None
    assert capabilities.controls[Control.SM_CLOCK].available
    assert not capabilities.controls[Control.MEMORY_CLOCK].available
    assert "one memory clock" in capabilities.controls[Control.MEMORY_CLOCK].reason
    seq = powerd.desire((rig.uuids[0], Control.MEMORY_CLOCK, Interval(1000, 1000)))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.MEMORY_CLOCK)
    assert (outcome.verdict, rig.truth(0)["setter_calls"]) == (Verdict.FAILED, 0)


def test_no_permission_is_learned_from_the_first_refusal_and_said(rig: Rig) -> None:
    rig.node.fault("permission", permission="none")
    powerd = served(rig)
    outcome = powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    assert (outcome.verdict, outcome.nvml_code) == (Verdict.FAILED, 4)
    assert "CAP_SYS_ADMIN" in outcome.detail

    def learned() -> bool:
        return not capabilities_of(powerd.tables[Table.CAPABILITIES][0]).controls[Control.POWER_LIMIT].available

    powerd.until(learned)


def test_processes_on_a_gpu_are_reported(rig: Rig) -> None:
    powerd = served(rig)
    with rig.load(1):
        found = powerd.until(lambda: processes_of(powerd.tables.get(Table.PROCESSES, {})).get(rig.uuids[1]))
    assert [p.pid for p in found] == [os.getpid()]


# ends of settings


def test_a_setpoint_that_expires_is_restored_without_powerd(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), ttl_s=0.3)
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.event("restored", uuid=rig.uuids[0], cause="setpoint_expired")
    assert rig.at_baseline()


def test_settings_outlive_a_powerd_that_comes_back_within_the_grace(rig: Rig) -> None:
    rig.configure(grace_s=20)
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.close()
    back = rig.connect()
    back.seq = 100
    outcome = back.outcome(back.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    assert outcome.verdict is Verdict.APPLIED
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["setter_calls"]) == (400_000, 1)


def test_settings_end_with_the_grace_when_powerd_stays_away(rig: Rig) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.close()
    truth_until(rig, rig.at_baseline)


def test_sigterm_restores_everything_and_exits_0(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.SM_CLOCK, LOCK))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.SM_CLOCK)
    serve.terminate()
    powerd.event("restored", uuid=rig.uuids[0], cause="shutdown")
    assert serve.wait(PATIENCE_S) == 0
    assert rig.at_baseline()


def test_panic_restores_and_refuses_until_resume(rig: Rig) -> None:
    powerd = served(rig)
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    powerd.command(Command.PANIC)
    powerd.event("restored", uuid=rig.uuids[0], cause="panic")
    powerd.desire(row)
    powerd.event("desired_refused")
    assert rig.at_baseline()
    powerd.command(Command.RESUME)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(0)["limit_mw"] == 400_000


def test_quiesce_restores_closes_every_handle_and_resumes(rig: Rig) -> None:
    powerd = served(rig)
    row = (rig.uuids[0], Control.POWER_LIMIT, LIMIT)
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT)
    worker = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("worker_pid"))
    powerd.command(Command.QUIESCE)
    powerd.until(lambda: powerd.tables[Table.STATUS]["hold"] == "quiesced" and not powerd.tables[Table.STATUS]["worker_pid"])
    assert not os.path.exists(f"/proc/{worker}")  # with the process all its handles are gone
    assert rig.at_baseline()
    powerd.command(Command.RESUME)
    powerd.until(lambda: powerd.tables[Table.STATUS]["serving"])
    powerd.outcome(powerd.desire(row), rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)


def test_quiesce_with_a_limit_resumes_by_itself(rig: Rig) -> None:
    powerd = served(rig)
    before = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("generation"))
    powerd.command(Command.QUIESCE, 300)
    powerd.until(lambda: powerd.tables[Table.STATUS]["serving"] and powerd.tables[Table.STATUS]["generation"] > before)


# GPUs and drivers in trouble


def test_a_hung_gpu_is_wedged_alone_and_comes_back(rig: Rig) -> None:
    rig.configure(hw="read_deadline_s = 0.3")
    powerd = served(rig)
    rig.node.fault("hang", 0)
    powerd.event("gpu_wedged", uuid=rig.uuids[0])
    powerd.until(lambda: powerd.readings[0].health is Health.WEDGED)
    outcome = powerd.outcome(powerd.desire((rig.uuids[1], Control.POWER_LIMIT, LIMIT)), rig.uuids[1], Control.POWER_LIMIT)
    assert outcome.verdict is Verdict.APPLIED
    first = powerd.readings[1].time_ns
    powerd.until(lambda: powerd.readings[1].time_ns > first and powerd.readings[1].health is Health.UP)
    assert powerd.readings[0].energy_mj is None
    rig.node.clear_faults(0)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)


def test_a_hang_in_the_drivers_lock_stops_sets_but_not_reads(rig: Rig) -> None:
    rig.configure(hw="write_deadline_s = 0.3")
    powerd = served(rig)
    rig.node.fault("hang-node")
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    outcome = powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.FAILED)
    assert "no answer from the driver" in outcome.detail
    powerd.until(lambda: powerd.readings[0].health is Health.WEDGED and powerd.readings[0].power_mw)
    first = powerd.readings[0].time_ns
    powerd.until(lambda: powerd.readings[0].time_ns > first)
    rig.node.clear_faults()
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)


def test_a_lost_gpu_is_lost_alone_and_gets_its_setting_back_when_it_returns(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.APPLIED)
    epoch = powerd.readings[0].epoch
    rig.node.fault("lost", 0)
    powerd.event("gpu_lost", uuid=rig.uuids[0])
    powerd.until(lambda: powerd.readings[0].health is Health.LOST)
    assert powerd.readings[1].health is Health.UP
    rig.node.clear_faults(0)
    rig.node.fault("foreign-reset", 0)
    powerd.until(lambda: powerd.readings[0].health is Health.UP)
    assert powerd.readings[0].epoch > epoch
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)


def test_a_gpu_lost_while_held_does_not_keep_the_others_from_restoring(rig: Rig) -> None:
    serve = rig.serve()
    powerd = rig.connect()
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT), (rig.uuids[1], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT)
    rig.node.fault("lost", 0)
    powerd.event("gpu_lost", uuid=rig.uuids[0])
    seq = powerd.desire()
    powerd.outcome(seq, rig.uuids[1], Control.POWER_LIMIT, Verdict.APPLIED)
    assert rig.truth(1)["limit_mw"] == 700_000
    serve.kill()


def test_a_driver_reload_starts_a_new_generation_that_sets_again_in_a_new_epoch(rig: Rig) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    epoch = powerd.readings[0].epoch
    rig.node.fault("driver-reload")
    powerd.event("worker_died")
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)
    powerd.until(lambda: powerd.readings[0].epoch > epoch)


def test_a_counter_reset_is_a_new_epoch_and_a_frozen_counter_is_suspect(rig: Rig) -> None:
    powerd = served(rig)
    epoch = powerd.readings[0].epoch
    rig.node.fault("counter-reset", 0)
    powerd.until(lambda: powerd.readings[0].epoch > epoch)
    rig.node.fault("freeze", 1)
    powerd.event("gpu_suspect", uuid=rig.uuids[1])
    powerd.until(lambda: powerd.readings[1].health is Health.SUSPECT and powerd.readings[0].health is Health.UP)


# somebody else changes a setting


def test_drift_of_a_limit_yields_by_default_and_leaves_their_value(rig: Rig) -> None:
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    rig.node.fault("foreign-limit", 0, value=650_000)
    powerd.event("drift", uuid=rig.uuids[0], subject="power_limit", policy="yield")
    assert powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT, Verdict.OVERRIDDEN).detail
    powerd.outcome(powerd.desire(), rig.uuids[0], Control.POWER_LIMIT)
    assert (rig.truth(0)["limit_mw"], rig.truth(0)["setter_calls"]) == (650_000, 1)


def test_drift_under_enforce_is_set_again(rig: Rig) -> None:
    rig.configure(hw='drift = "enforce"')
    powerd = served(rig)
    seq = powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT))
    powerd.outcome(seq, rig.uuids[0], Control.POWER_LIMIT)
    rig.node.fault("foreign-limit", 0, value=650_000)
    powerd.event("drift", uuid=rig.uuids[0], policy="enforce")
    truth_until(rig, lambda: rig.truth(0)["limit_mw"] == 400_000)


def test_a_lock_that_somebody_removes_is_seen_under_load(rig: Rig) -> None:
    rig.configure(hw='drift = "warn"')
    powerd = served(rig)
    with rig.load(0):
        seq = powerd.desire((rig.uuids[0], Control.SM_CLOCK, LOCK))
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.APPLIED)
        rig.node.fault("foreign-lock", 0, value=0)
        powerd.event("drift", uuid=rig.uuids[0], subject="sm_clock", policy="warn")
        powerd.outcome(seq, rig.uuids[0], Control.SM_CLOCK, Verdict.OVERRIDDEN)


# callers


def test_a_second_powerd_hw_exits_75_with_one_line_and_changes_nothing(rig: Rig) -> None:
    served(rig)
    second = rig.serve()
    _, text = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 75
    assert len(text.splitlines()) == 1
    assert "another one holds" in text


def test_a_second_powerd_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    powerd = served(rig)
    other = Powerd.connect(rig.socket)
    other.until(lambda: other.hello)
    assert other.hello["refused"] == "another powerd is connected"
    seen = powerd.snapshots
    powerd.until(lambda: powerd.snapshots > seen)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        frames.encode_command(1, 0, Command.PANIC)[:-1],
        frames.encode_desired(1, 0, [])[:-1] + b"xx",
        frames.encode_command(1, 0, Command.PANIC)[:2] + b"\x63" + frames.encode_command(1, 0, Command.PANIC)[3:],
        os.urandom(4000),
    ],
)
def test_a_frame_that_does_not_parse_changes_nothing_and_the_next_connection_serves(rig: Rig, frame: bytes) -> None:
    powerd = served(rig)
    powerd.outcome(powerd.desire((rig.uuids[0], Control.POWER_LIMIT, LIMIT)), rig.uuids[0], Control.POWER_LIMIT)
    powerd.link.send(frame or b"\x57")
    powerd.event("frame_refused")
    assert rig.truth(0)["limit_mw"] == 400_000
    powerd.close()
    assert rig.connect().hello["wire"] == frames.WIRE_VERSION


def test_a_wrong_version_in_hello_is_refused_with_what_to_do(rig: Rig) -> None:
    rig.serve()
    powerd = Powerd.connect(rig.socket)
    for frame in frames.encode_table(frames.Kind.HELLO, 0, 0, Table.HELLO, {"wire": 99}):
        powerd.link.send(frame)
    powerd.until(lambda: powerd.hello is not None and "refused" in powerd.hello)
    assert "upgrade" in powerd.hello["refused"]


def test_another_user_is_refused(rig: Rig) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    rig.configure(hw='peer_user = "daemon"')
    rig.serve()
    Powerd.connect(rig.socket).close()
    os.chmod(rig.socket.parent, 0o755)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.connect(str(rig.socket))
            code = 0 if b"uid 65534 may not connect" in link.recv(frames.MAX_FRAME) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_driver_is_one_line_and_69(rig: Rig) -> None:
    child = rig.command("serve", LD_LIBRARY_PATH="", POWERD_SIM_STATE="")
    _, text = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 69
    assert len(text.splitlines()) == 1
    assert "install the NVIDIA driver" in text


def test_systemd_hears_ready_and_a_watchdog_that_stops_with_the_snapshots(rig: Rig) -> None:
    path = str(rig.socket.parent / "notify")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(path)
    manager.settimeout(PATIENCE_S)
    serve = rig.command("serve", NOTIFY_SOCKET=path, WATCHDOG_USEC="300000")
    heard = [manager.recv(4096).decode() for _ in range(3)]
    assert any("READY=1" in line for line in heard)
    assert "WATCHDOG=1" in heard
    powerd = rig.connect()
    worker = powerd.until(lambda: powerd.tables.get(Table.STATUS, {}).get("worker_pid"))
    os.kill(worker, signal.SIGSTOP)
    manager.settimeout(1.0)
    silent = False
    for _ in range(20):  # what was under way when the worker stopped, then nothing
        try:
            manager.recv(4096)
        except TimeoutError:
            silent = True
            break
    assert silent
    os.kill(worker, signal.SIGCONT)
    assert manager.recv(4096)
    serve.kill()
    manager.close()
