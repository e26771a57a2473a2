"""A burst, a change of tensor parallelism and three kills, on real Ray Serve: no request is lost and nothing stays locked.

House rules: DynamoLLM's own controller decides, and a test steers it by the load alone; one service for all tests, in their
order, because Ray takes seconds to start; every request that is sent is counted; what GPUs are set to is read from the simulator,
not from powerd.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from powerd.replicatypes import ReplicaView
from powerd_integrations.fleet.published import Group
from tests.e2e.live import wait_for
from tests.ray.rig import GPUS, POOL, STRICT, TTFT_S, Outcome, Service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]

MAX_MHZ = 1980
OVERLOAD = 60  # requests of 8,000 tokens: more than half a minute of all engines together


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as running:
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


def works_slowly(view: ReplicaView) -> bool:
    """Whether a replica has requests and powerd holds a clock below the maximum for it."""
    return bool(view.running) and view.state == "fresh" and view.clock_mhz is not None and view.clock_mhz < MAX_MHZ


def plans_slowly(service: Service) -> bool:
    """Whether the policy counts with less than the highest clock."""
    return any(clock_mhz < MAX_MHZ for clock_mhz in service.plan().clocks_mhz.values())


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


def test_with_nothing_known_every_gpu_serves_and_then_what_the_load_needs(service: Service) -> None:
    service.wait_serving({4: 2}, 60)
    sent = service.load_until(lambda: service.serving() == {2: 1}, rate=1.0)
    assert in_slo(all_answered(sent, 20)) == 1.0
    assert ("scale", "LL") in [event[:2] for event in service.events()]


def test_a_burst_adds_replicas_and_lowers_clocks_and_its_end_takes_them_away(service: Service) -> None:
    sent = service.load_until(lambda: service.serving().get(2, 0) >= 2, rate=6.0)
    sent += service.load_until(lambda: any(works_slowly(view) for view in service.live.client.replicas()), rate=6.0)
    assert locked(service) != []
    all_answered(sent, 20)
    sent = service.load_until(lambda: service.serving() == {2: 1}, rate=1.0)
    all_answered(sent, 20)


def test_long_requests_change_the_parallelism_and_the_new_one_serves_before_the_old_one_ends(service: Service) -> None:
    seen: list[dict[int, int]] = []

    def changed() -> bool:
        seen.append(service.serving())
        return 2 not in seen[-1] and bool(seen[-1])

    sent = service.load_until(changed, rate=0.5, tokens=110, prompt=3000)
    sent += service.load_until(lambda: plans_slowly(service), rate=0.5, tokens=110, prompt=3000)
    all_answered(sent, 110)
    assert all(seen), "somebody served at every time"
    assert any(2 in counts and 4 in counts for counts in seen), "the new one served before the old one ended"
    assert service.plan().routes[STRICT] == (Group(POOL, 4),)


def test_a_killed_replica_costs_no_request(service: Service) -> None:
    sent = service.load_until(lambda: service.serving() == {4: 2}, rate=2.0, tokens=110, prompt=3000)
    victim, pid = sorted(service.replica_pids().items())[0]
    wait_for("requests run", lambda: sum(not future.done() for future in sent) >= 4)
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        pids = service.replica_pids()
        return victim not in pids and len(pids) == 2 and service.serving() == {4: 2}

    sent += service.load_until(replaced, rate=2.0, tokens=110, prompt=3000)
    all_answered(sent, 110)
    after = service.load_until(lambda: service.serving() == {2: 1}, rate=1.0)
    assert in_slo(all_answered(after, 20)) == 1.0
    wait_for("no engine or page is left but the one replica's, also none of the killed one", lambda: engines_alive(service) == 2)


def test_when_the_only_engine_is_killed_answers_go_on_at_the_next_one(service: Service) -> None:
    """A replica without an engine, which refuses at once, must not use up every attempt; who waits beyond its TTFT is told so."""
    (name,) = [one.id for one in service.plan().serving]
    begun = [service.open(tokens=200) for _ in range(3)]
    heads = [answer.readline() for answer in begun]
    os.kill(int((service.live.root / f"{name}.engine").read_text()), signal.SIGKILL)

    def replaced() -> bool:
        return name not in {one.id for one in service.plan().serving} and service.serving() == {2: 1}

    sent = service.load_until(replaced, rate=2.0)
    texts = [head + answer.read() for head, answer in zip(heads, begun, strict=True)]
    assert [text.count(b'"text":"tok "') for text in texts] == [200] * 3, texts
    refused = [o for o in (future.result(timeout=60) for future in sent) if o.status == 503 and "overload: it waited" in o.error]
    all_answered([future for future in sent if future.result() not in refused], 20)


def test_an_overload_is_refused_early_and_the_rest_answered_and_it_ends(service: Service) -> None:
    """More prompts at once than eight GPUs compute within their TTFT: the ladder's last rung, rejection, by real Ray."""
    sent = [service.send(tokens=5, prompt=8000) for _ in range(OVERLOAD)]
    outcomes = [future.result(timeout=60) for future in sent]
    refused = [o for o in outcomes if o.status == 503]
    answered = [o for o in outcomes if o.status == 200 and o.whole and o.tokens == 5 and not o.error]
    assert len(refused) + len(answered) == OVERLOAD, [o for o in outcomes if o not in refused and o not in answered]
    assert refused
    assert answered
    waits_s = [float(found[1]) for o in refused if (found := re.search(r"overload: it waited (\S+) s", o.error))]
    assert len(waits_s) == len(refused)
    assert TTFT_S <= min(waits_s) <= max(waits_s) < 3 * TTFT_S, "told early, and nobody before it is late"

    def told() -> int:
        rows = [detail for kind, _, detail in service.events() if kind == "emergency"]
        return sum(int(found[1]) for detail in rows if (found := re.search(r"(\d+) were rejected", detail)))

    wait_for("the planner knows of every one", lambda: told() == len(refused))
    after = service.load_until(lambda: service.serving() == {2: 1}, rate=1.0)
    assert in_slo(all_answered(after[-5:], 20)) == 1.0


def test_a_killed_daemon_leaves_no_clock_behind(service: Service) -> None:
    wait_for("an idle replica's clocks are lowered", lambda: len(locked(service)) == 2)
    os.kill(service.live.process.pid, signal.SIGKILL)
    service.live.process.wait()
    sent = service.run_load(rate=2.0, seconds=2.0)
    wait_for("clocks are back at baseline", lambda: locked(service) == [], 15)
    assert in_slo(all_answered(sent, 20)) == 1.0
    service.live.start()
    wait_for("the replica is registered again", lambda: len(service.live.client.replicas()) == 1, 40)
    try:
        wait_for("and its idle clocks lowered again", lambda: len(locked(service)) == 2)
    except AssertionError:
        print(service.live.client.replicas(), service.live.client.leases(), service.live.log.read_text()[-5000:])
        raise


def test_a_killed_metrics_page_gives_the_full_clock_and_freezes_the_plan(service: Service) -> None:
    (replica,) = service.live.client.replicas()
    os.kill(int((service.live.root / f"{replica.name}.metrics").read_text()), signal.SIGKILL)
    wait_for("full clock while nobody knows the load", lambda: locked(service) == [])
    wait_for("nothing shrinks", lambda: "stale" in service.plan().held)
    sent = service.run_load(rate=1.0, seconds=8.0)  # longer than a replica that is gone is remembered
    assert in_slo(all_answered(sent, 20)) == 1.0
    assert "stale" in service.plan().held
    assert replica.name in {one.id for one in service.plan().serving}, "who answers is not gone"


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
