"""A burst, a change of tensor parallelism and three kills, on real Ray Serve: no request is lost and nothing stays locked.

House rules: one service for all tests, in their order, because Ray takes seconds to start; every request that is sent is counted;
what GPUs are set to is read from the simulator, not from powerd.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from powerd_integrations.fleet.published import Group
from tests.e2e.live import wait_for
from tests.ray.rig import GPUS, Outcome, Service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

MAX_MHZ = 1980


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as running:
        running.wait_serving(tp2=1)
        yield running


def all_answered(sent: Iterable[Future[Outcome]], tokens: int) -> list[Outcome]:
    """Every request was answered in full, exactly once."""
    outcomes = [future.result(timeout=60) for future in sent]
    assert [o for o in outcomes if not (o.status == 200 and o.whole and o.tokens == tokens and not o.error)] == []
    assert len({o.number for o in outcomes}) == len(outcomes)
    return outcomes


def in_slo(outcomes: list[Outcome]) -> float:
    return sum(o.within_slo for o in outcomes) / len(outcomes)


def locked(service: Service) -> list[int]:
    """GPUs whose clock is held below the maximum, as the simulator knows."""
    rows = service.live.node.show()["gpus"]
    return [n for n, row in enumerate(rows) if row["locked_clocks_mhz"] and row["locked_clocks_mhz"][1] < MAX_MHZ]


def oldest_load_s(service: Service) -> float:
    """As the controller was shown it last."""
    return max((instance.load.age_s for instance in service.controller.shown), default=0.0)


def engines_alive(service: Service) -> int:
    pids = [int(path.read_text()) for pattern in ("*.engine", "*.metrics") for path in service.live.root.glob(pattern)]
    return sum(Path(f"/proc/{pid}/cmdline").exists() and b"engine" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def test_it_listens_on_loopback_only(service: Service) -> None:
    inodes = set()
    for pid in service.ray_pids():
        for fd in os.scandir(f"/proc/{pid}/fd"):
            try:
                inodes.add(os.readlink(fd.path))
            except OSError:
                continue
    wide = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            listens, address = words[3] == "0A", words[1].rpartition(":")[0]
            if listens and f"socket:[{words[9]}]" in inodes and not address.endswith(("0100007F", "01000000")):
                wide.append(line)
    assert wide == []


def test_a_burst_adds_replicas_and_its_end_takes_them_away(service: Service) -> None:
    before = all_answered([service.send()], 20)
    assert in_slo(before) == 1.0
    sent = service.load_until(lambda: service.serving() == {Group("all", 2): 3}, rate=8.0)
    all_answered(sent, 20)
    service.wait_serving(tp2=1)


def test_another_tensor_parallelism_is_started_before_the_old_one_ends(service: Service) -> None:
    seen: list[dict[Group, int]] = []
    old, new = Group("all", 2), Group("all", 4)
    service.controller.tp = 4

    def changed() -> bool:
        seen.append(service.serving())
        return seen[-1] == {new: 1}

    sent = service.load_until(changed, rate=2.0, tokens=40)
    all_answered(sent, 40)
    service.wait_serving(tp4=1)
    assert all(counts for counts in seen), "somebody served at every time"
    assert any(old in counts and new in counts for counts in seen), "the new one served before the old one ended"
    assert service.planner.plan().routes["SS"] == (new,)


def test_a_killed_replica_costs_no_request(service: Service) -> None:
    service.controller.at_least = 2
    service.wait_serving(tp4=2)
    victim, pid = sorted(service.replica_pids().items())[0]
    sent = [service.send(tokens=60) for _ in range(8)]
    wait_for("requests run", lambda: sum(not f.done() for f in sent) >= 6)
    os.kill(pid, signal.SIGKILL)
    sent += service.run_load(rate=4.0, seconds=2.0, tokens=60)
    all_answered(sent, 60)
    wait_for("a new replica serves instead", lambda: victim not in service.replica_pids())
    service.wait_serving(tp4=2)
    wait_for("the killed replica's engine and its page have ended with it", lambda: engines_alive(service) == 4)
    after = all_answered(service.run_load(rate=3.0, seconds=2.0), 20)
    assert in_slo(after) == 1.0
    service.controller.at_least = 1


def test_a_killed_daemon_leaves_no_clock_behind(service: Service) -> None:
    service.wait_serving(tp4=1)
    wait_for("an idle replica's clocks are lowered", lambda: len(locked(service)) == 4)
    os.kill(service.live.process.pid, signal.SIGKILL)
    service.live.process.wait()
    sent = service.run_load(rate=2.0, seconds=2.0)
    wait_for("clocks are back at baseline", lambda: locked(service) == [], 15)
    assert in_slo(all_answered(sent, 20)) == 1.0
    service.live.start()
    wait_for("the replica is registered again", lambda: len(service.live.client.replicas()) == 1, 40)
    try:
        wait_for("and its idle clocks lowered again", lambda: len(locked(service)) == 4)
    except AssertionError:
        print(service.live.client.replicas(), service.live.client.leases(), service.live.log.read_text()[-5000:])
        raise


def test_a_killed_metrics_page_gives_the_full_clock_and_freezes_the_plan(service: Service) -> None:
    (replica,) = service.live.client.replicas()
    os.kill(int((service.live.root / f"{replica.name}.metrics").read_text()), signal.SIGKILL)
    wait_for("full clock while nobody knows the load", lambda: locked(service) == [])
    wait_for("nothing shrinks", lambda: "stale" in service.planner.plan().held)
    wait_for("it is longer stale than a replica that is gone is remembered", lambda: oldest_load_s(service) > 8.0)
    assert in_slo(all_answered(service.run_load(rate=2.0, seconds=2.0), 20)) == 1.0


def test_a_client_that_hangs_up_ends_its_request_at_the_engine(service: Service) -> None:
    engine = int((service.live.root / f"{service.live.client.replicas()[0].name}.engine").read_text())
    page = service.engine_page(engine)
    answer = service.open(tokens=5000)
    assert answer.readline().startswith(b"data: ")
    assert page().running == 1
    answer.close()
    wait_for("the engine has dropped it", lambda: page().running == 0)


def test_when_it_ends_nothing_stays(service: Service) -> None:
    service.stop_ray()
    assert service.ray_pids() == []
    wait_for("no engine is left", lambda: engines_alive(service) == 0)
    wait_for("every lease is gone", lambda: service.live.client.replicas() == ())
    assert locked(service) == []
    rows = service.live.node.show()["gpus"]
    assert [row["processes"] for row in rows] == [0] * GPUS
