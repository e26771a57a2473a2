"""The embedded store when it is killed, the disk is full, the file is corrupt or the writer is stuck."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from powerd.clock import RealClock
from powerd.config import StoreConfig
from powerd.errors import UnavailableError
from powerd.model import Event
from powerd.sinks import writer
from powerd.sinks.store import Store
from tests.sinks.stored import T0, A, fill, snapshot, store

WRITER = """
import sys
from pathlib import Path
from powerd.clock import NS, RealClock
from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.store import Store

store = Store(Path(sys.argv[1]), StoreConfig(), RealClock())
T0 = int(sys.argv[2])
second, told = 0, 0
while True:
    for tenth in range(10):
        ns = (T0 + second) * NS + tenth * NS // 10
        store.append(Snapshot(0, ns, ns, (Reading(sys.argv[3], ns, Health.UP, 1, second * 300_000, ns, 300_000),)))
    second += 1
    while store.stats().rows < second - 60:
        pass
    if store.stats().rows >= told + 500:
        told = store.stats().rows
        print(told, flush=True)
"""


def test_sigkill_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    for round_number in range(3):
        t0 = T0 + round_number * 100_000
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(t0), A], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(2)][-1]
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        again = store(tmp_path)
        rows: list[tuple[Any, ...]] = list(again.rows([A], t0, t0 + 100_000, ["energy_mj"], "raw"))
        minutes: list[tuple[Any, ...]] = list(again.rows([A], t0, t0 + 100_000, ["energy_mj"], "r60"))
        assert again.stats().quarantined == 0
        again.close()
        assert len(rows) >= told
        assert [r[2] for r in rows] == [300_000.0 * n for n in range(len(rows))]
        assert all(r[2] == 300_000.0 * (r[0] - t0 + 59) for r in minutes[:-1])
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


FULL = """
import json, resource, sys, time
from pathlib import Path
from powerd.clock import NS, RealClock
from powerd.config import StoreConfig
from powerd.model import Health, Reading, Snapshot
from powerd.sinks import writer
from powerd.sinks.store import Store

writer.RETRY_ROUNDS = 0
store = Store(Path(sys.argv[1]), StoreConfig(), RealClock())
T0 = int(sys.argv[2])
second = 0

def put(seconds):
    global second
    for _ in range(seconds):
        ns = (T0 + second) * NS
        store.append(Snapshot(0, ns, ns, (Reading(sys.argv[3], ns, Health.UP, 1, second * 300_000, ns, 300_000),)))
        second += 1

def wait(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, store.stats()
        time.sleep(0.01)

put(200)
wait(lambda: store.stats().rows >= 199)
size = store.stats().size_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
slowest = 0.0
while not store.stats().errors:
    begin = time.monotonic()
    put(1000)
    slowest = max(slowest, time.monotonic() - begin)
    time.sleep(0.05)
full = store.stats()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
put(100)
store.close()
after = store.stats()
print(json.dumps({"problem": full.problem, "errors": full.errors, "rows": after.rows, "sent": second, "dropped": after.dropped,
                  "after": after.problem}))
"""


def test_a_full_disk_is_told_counted_and_forgotten_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(T0), A], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["errors"] >= 1
    assert "store.sqlite" in told["problem"]
    assert told["after"] == ""
    assert told["rows"] + told["dropped"] >= told["sent"]
    again = store(tmp_path)
    rows = list(again.rows([A], T0, T0 + told["sent"], ["energy_mj"]))
    again.close()
    assert len(rows) == told["rows"]


def test_a_place_that_cannot_be_written_degrades_and_never_raises(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    one = Store(blocked / "store.sqlite", StoreConfig(), RealClock())
    fill(one, range(0, 200))
    one.append_event(Event(1, 1, 1, "drift"))
    with pytest.raises(UnavailableError):
        one.history([A], T0, T0 + 10)
    one.close()
    stats = one.stats()
    assert stats.errors >= 1
    assert stats.rows == 0
    assert "file" in stats.problem


def test_a_corrupt_file_is_put_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"this is not a database" * 1000)
    one = store(tmp_path)
    fill(one, range(0, 200))
    one.close()
    assert one.stats().quarantined == 1
    assert len(list(tmp_path.glob("store.sqlite.corrupt-*"))) == 1
    again = store(tmp_path)
    assert len(list(again.rows([A], T0, T0 + 200, ["energy_mj"]))) == 200
    again.close()


def test_a_file_torn_in_the_middle_is_put_aside_when_it_is_noticed(tmp_path: Path) -> None:
    one = store(tmp_path)
    fill(one, range(0, 2000))
    one.close()
    path = tmp_path / "store.sqlite"
    data = bytearray(path.read_bytes())
    for offset in range(4096, len(data), 4096):
        data[offset : offset + 4096] = b"\xff" * min(4096, len(data) - offset)
    path.write_bytes(data)
    again = store(tmp_path)
    fill(again, range(2000, 2200))
    again.close()
    assert again.stats().quarantined == 1
    assert again.stats().problem == ""
    assert again.stats().rows == 400


def test_a_writer_that_is_stuck_costs_rows_and_never_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = writer.Writer._guarded
    monkeypatch.setattr(writer.Writer, "_guarded", lambda self: (gate.wait(), real(self))[1])
    one = store(tmp_path)
    for number in range(20_000):
        one.append(snapshot(number / 10, (A,), power_mw=1))
    assert one.stats().dropped > 10_000
    gate.set()
    one.close()
    assert one.stats().rows > 0
