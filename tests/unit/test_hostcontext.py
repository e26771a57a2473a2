"""The host around the GPUs: read once a second, owners by name, a process that has gone is no error."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys

from powerd.hostcontext import HostContext
from powerd.model import Snapshot
from powerd.records import HostLoad
from powerd.sinks.metrics import Metrics

S = 10**9


def test_the_host_is_read_once_a_second() -> None:
    host, seen = HostContext(), list[HostLoad]()
    host.listeners.append(seen.append)
    for tick in range(35):  # 3.5 s at 10 Hz
        host.observe(Snapshot(tick, tick * S // 10, 100 * S + tick * S // 10, ()))
    assert [load.wall_ns // S for load in seen] == [101, 102, 103]
    assert host.load is seen[-1]


def test_owners_are_named_and_those_who_left_are_not_guessed() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    found = HostContext().processes({"GPU-b": frozenset({os.getpid()}), "GPU-a": frozenset({os.getpid(), gone.pid})})
    assert [p.uuid for p in found] == ["GPU-a", "GPU-a", "GPU-b"]
    mine = [p for p in found if p.pid == os.getpid()]
    assert {p.user for p in mine} == {getpass.getuser()}
    assert [(p.user, p.name) for p in found if p.pid == gone.pid] == [(None, None)]


def test_what_the_system_does_not_tell_has_no_series() -> None:
    metrics = Metrics()
    metrics.host(HostLoad(S, 0.25, 1.5, 1 << 30, 4 << 30))
    assert "powerd_node_cpu_utilization_ratio 0.25" in metrics.render()[0].decode()
    metrics.host(HostLoad(2 * S, None, None, None, None))
    assert "powerd_node_" not in metrics.render()[0].decode()
