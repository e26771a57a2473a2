"""Clock plans as their holder sees them: armed through a lease, driven by beats, told what becomes of them; simulated node."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

import pytest

from powerd.api import PlanView
from powerd.client import Client, Lease
from powerd.client.beats import BeatDesk, Beats, inert
from powerd.errors import LeaseLostError, RequestError
from powerd.model import ClockPlan, PlanState
from tests.client.test_on_simulated_node import Node, node, rig

__all__ = ["node", "rig"]

CLOCKS = (1410, 1200, 900)


def lease_on(client: Client) -> Lease:
    return client.lease([0], sm_clock_mhz=(None, 1410), reason="pipeline", min_dwell_s=0.0)


def plan_for(lease: Lease, plan_id: str = "p1", clocks: tuple[int, ...] = CLOCKS, safe: int | None = 1005) -> ClockPlan:
    return ClockPlan(plan_id, lease.view.gpus[0], clocks, safe, iteration_s=60.0)


def locked(node: Node, mhz: int) -> None:
    node.until(lambda: node.locks()[0] == (mhz, mhz), f"the clock is {mhz} MHz")


def test_a_training_loop_drives_its_plan(node: Node) -> None:
    with Client() as client, lease_on(client) as lease, lease.arm(plan_for(lease)) as beats:
        locked(node, 1005)
        for step in range(3):
            for index, mhz in enumerate(CLOCKS):
                beats.send(step, index)
                locked(node, mhz)
        beats.safe()
        locked(node, 1005)
        beats.send(3, 0)
        locked(node, 1410)
        assert beats.alive
        assert beats.dropped == 0
        (view,) = lease.plans()
        assert (view.id, view.lease, view.instructions) == ("p1", lease.id, 3)
        assert client.lease_view(lease.id).plans[0].number == view.number
        beats.close()
        node.until(lambda: node.locks()[0] == (210, 1410), "the lease's own bounds hold again")
        assert lease.plans() == ()
        beats.close()  # twice is harmless


def test_a_new_plan_is_swapped_in_at_a_step(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with Client() as client, lease_on(client) as lease:
        old = lease.arm(plan_for(lease))
        old.send(0, 0)
        new = lease.arm(plan_for(lease, "p2", (1110, 1305)))
        old.send(0, 1)
        locked(node, 1200)
        new.send(1, 0)
        locked(node, 1110)
        node.until(lambda: not old.alive, "the old plan is over")
        assert old.view.why == "replaced"
        assert not caplog.records, "a swap is nothing to warn of"
        new.send(1, 1)
        locked(node, 1305)


def test_a_lower_ceiling_is_told_so_that_the_holder_can_plan_anew(node: Node) -> None:
    with Client() as client, lease_on(client) as lease, lease.arm(plan_for(lease)) as beats:
        told: list[int | None] = []
        beats.on_clamped = told.append
        beats.send(0, 0)
        with client.lease([0], sm_clock_mhz=(None, 1110), reason="a quieter neighbour", min_dwell_s=0.0):
            locked(node, 1110)
            node.until(lambda: beats.clamped == 1110, "the holder knows its ceiling")
            beats.send(0, 1)
            beats.send(0, 2)
            locked(node, 900)
            assert any(e.kind == "plan_clamped" for e in client.events())
        node.until(lambda: beats.clamped is None, "nothing cuts it any more")
        assert told == [1110, None]


def test_a_plan_ends_with_its_lease_and_beats_then_go_nowhere(node: Node) -> None:
    client = Client()
    lease = lease_on(client)
    beats = lease.arm(plan_for(lease))
    beats.send(0, 0)
    locked(node, 1410)
    lease.release()
    assert not beats.alive
    beats.send(0, 1)
    beats.safe()
    beats.close()
    assert beats.dropped == 2
    with pytest.raises(LeaseLostError):
        lease.arm(plan_for(lease))


def test_a_lease_that_wants_something_else_has_no_plan_any_more(node: Node) -> None:
    with Client() as client, client.lease([0], sm_clock_mhz=1200, power_limit_w=400, min_dwell_s=0.0) as lease:
        ended: list[str] = []
        beats = lease.arm(plan_for(lease, safe=None))
        beats.on_ended = ended.append
        beats.send(0, 1 - 1)
        lease.change(power_limit_w=300)
        node.until(lambda: bool(ended), "the holder is told")
        assert not beats.alive
        node.until(lambda: node.locks()[0] == (0, 0), "the clock is nobody's")


def test_panic_ends_a_plan_and_its_holder_hears_it(node: Node) -> None:
    with Client() as client:
        lease = lease_on(client)
        beats = lease.arm(plan_for(lease))
        beats.send(0, 0)
        locked(node, 1410)
        client.panic()
        node.until(lambda: not beats.alive and not lease.held, "both are over")
        client.resume()


def test_a_daemon_that_is_killed_and_comes_back_knows_the_plan_again(node: Node) -> None:
    with Client() as client, lease_on(client) as lease:
        beats = lease.arm(plan_for(lease))
        beats.send(0, 0)
        locked(node, 1410)
        node.daemon.kill()
        node.daemon.wait()
        beats.send(0, 1)
        locked(node, 1200)
        node.daemon = node.start_daemon()
        node.until(lease.renew, "the lease answers again")
        beats.send(0, 2)
        locked(node, 900)
        node.until(lambda: [v.id for v in lease.plans()] == ["p1"], "the new daemon shows the plan")
        beats.send(1, 0)
        locked(node, 1410)
        assert beats.alive
        beats.close()
        assert lease.plans() == ()


def test_a_forked_child_does_not_beat(node: Node) -> None:
    with Client() as client, lease_on(client) as lease, lease.arm(plan_for(lease)) as beats:
        beats.send(0, 0)
        locked(node, 1410)
        child = os.fork()
        if child == 0:
            beats.send(0, 1)
            os._exit(0 if not beats.alive and beats.dropped == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert node.locks()[0] == (1410, 1410)
        beats.send(0, 1)
        locked(node, 1200)


def test_a_holder_that_dies_leaves_no_lock_behind(node: Node) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lease = lease_on(Client())
        beats = lease.arm(plan_for(lease))
        beats.send(0, 0)
        os.write(writer, b"x")
        signal.pause()
    assert os.read(reader, 1) == b"x"
    locked(node, 1410)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    node.until(lambda: node.locks()[0] == (0, 0), "the GPU is unlocked")
    os.close(reader)
    os.close(writer)


def test_a_plan_that_cannot_be_is_refused_by_the_index_of_its_wrong_clock(node: Node) -> None:
    with Client() as client, lease_on(client) as lease:
        with pytest.raises(RequestError, match=r"clocks_mhz\[1\]: 5000 MHz"):
            lease.arm(plan_for(lease, clocks=(1410, 5000)))
        with pytest.raises(RequestError, match="iteration_s"):
            lease.arm(ClockPlan("p", lease.view.gpus[0], (900,), None, 0.0))
        assert lease.plans() == ()
        assert node.locks()[0] == (210, 1410)
        longest = lease.arm(plan_for(lease, clocks=tuple(900 + 15 * (n % 20) for n in range(65536))))
        assert longest.view.instructions == 65536
        longest.close()


def test_with_on_error_log_a_plan_that_cannot_be_is_one_warning(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with Client(on_error="log") as client, lease_on(client) as lease:
        with caplog.at_level(logging.WARNING), lease.arm(plan_for(lease, clocks=(1,))) as beats:
            for index in range(1000):
                beats.send(0, index)
            beats.safe()
            assert not beats.alive
            assert beats.clamped is None
        assert len(caplog.records) == 1


@pytest.mark.parametrize("wrong", [(-1, 0), (1 << 32, 0), (0, 2.5), (None, 0), ("a", "b")])
def test_numbers_that_are_no_beat_are_dropped(wrong: tuple[Any, Any]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    view = PlanView("p", "l", "g", PlanState.ARMED, 1, None, None, None, 0, number=5)
    beats = Beats(None, view, theirs, lambda: None)
    beats.send(*wrong)
    assert beats.dropped == 1
    beats.send(1, 0)
    assert ours.recv(64) == (5).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4)
    beats.close()
    assert ours.recv(64) == b""
    ours.close()


def test_a_reader_that_hangs_costs_beats_and_no_time() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    beats = Beats(None, PlanView("p", "l", "g", PlanState.ARMED, 1, None, None, None, 0), theirs, lambda: None)
    for step in range(5000):
        beats.send(step, 0)
    assert 0 < beats.dropped < 5000
    assert beats.alive
    ours.close()
    beats.send(1, 0)
    assert not beats.alive
    beats.close()


def test_a_callback_that_fails_does_not_end_the_thread_that_follows_the_lease() -> None:
    desk = BeatDesk()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    row = {"id": "p", "lease": "l", "uuid": "g", "state": "running", "instructions": 1, "step": 1, "index": 0,
           "ceiling_mhz": None, "switches": 1, "why": "", "number": 9}  # fmt: skip
    assert desk.take({"beats": "p", "number": 9}, [theirs.detach()])
    with Client(on_error="log", url="http://127.0.0.1:9") as client:
        view = PlanView("p", "l", "g", PlanState.ARMED, 1, None, None, None, 0, number=9)
        beats = desk.give(client, view, 1.0, lambda: None)
        beats.on_clamped = lambda ceiling_mhz: 1 / 0  # type: ignore[assignment]
        assert desk.take({"plan": {**row, "ceiling_mhz": 1110}}, [])
        assert beats.clamped == 1110
        assert desk.take({"plan": {**row, "state": "ended", "why": "replaced"}}, [])
        assert not beats.alive
    ours.close()


def test_beats_of_nothing_answer_everything() -> None:
    beats = inert(None)
    threading.Thread(target=beats.send, args=(0, 0)).start()
    with beats:
        beats.safe()
    assert (beats.alive, beats.clamped) == (False, None)
