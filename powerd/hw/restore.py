"""``restore``: replay the journal at once, without a supervisor, so that a dead powerd-hw leaves no GPU behind.

House rules: raises the generation first, so that no left-over worker can write after it; every pair on its own, retried; says one
line per control; touches no driver when there is nothing to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from powerd.clock import NS, Clock, Waiter
from powerd.config import Config, journal_dir
from powerd.errors import EXIT_OK, EXIT_TEMPFAIL
from powerd.hw import fence, handover, nvml
from powerd.hw.actuator import Actuator
from powerd.hw.fence import Fence
from powerd.hw.journal import FILE_NAME, Journal, is_clean, prepare_directory
from powerd.hw.worker import everything
from powerd.model import Outcome

_LOCK_LIMIT_NS = 15 * NS  # a worker whose supervisor has died restores by itself first
_LIMIT_NS = 20 * NS


def restore(config: Config, clock: Clock, *, after_hand_over: bool = False) -> int:
    """0 when everything is at baseline, 75 when something is left (one line says what)."""
    directory = journal_dir(config)
    if not (directory / FILE_NAME).exists():
        return EXIT_OK
    prepare_directory(directory)
    waiter = clock.waiter("restore")
    try:
        if until_ns := handover.until(directory, clock.now_ns()):
            if not after_hand_over:
                print("powerd-hw: hand-over in progress: settings stay")
                return EXIT_OK
            waiter.wait_until(until_ns)
        limit_ns = clock.now_ns() + _LOCK_LIMIT_NS
        while (lock := fence.take_lock(directory)) is None:
            if after_hand_over:
                return EXIT_OK  # a new powerd-hw has taken over
            if clock.now_ns() >= limit_ns:
                print(f"powerd-hw: another one holds {directory}/lock: it restores by itself when stopped", file=sys.stderr)
                return EXIT_TEMPFAIL
            waiter.wait_until(clock.now_ns() + NS // 20)
        try:
            return _replay(config, clock, directory)
        finally:
            os.close(lock)
    finally:
        waiter.close()


def _replay(config: Config, clock: Clock, directory: Path) -> int:
    if is_clean(directory):
        return EXIT_OK
    waiter = clock.waiter("replay")

    def wait(attempt: int) -> bool:
        waiter.wait_until(clock.now_ns() + NS // 10)
        return attempt < round(config.hw.write_deadline_s * 10)

    node = nvml.open_node()
    generation = fence.next_generation(directory, wait)
    devices = list(node.devices())
    capabilities = [device.capabilities() for device in devices]
    journal = Journal(directory, node.driver_load_id, generation, everything(capabilities, config))
    if journal.recovered.damaged:
        print(f"powerd-hw: journal: {journal.recovered.damaged}: everything goes to its rule baseline", file=sys.stderr)
    actuators = [
        Actuator(d, c, config, clock, journal, Fence(directory, generation), _ignore, _say)
        for d, c in zip(devices, capabilities, strict=True)
    ]
    for actuator in actuators:
        hand = clock.waiter(f"restore {actuator.uuid}")
        actuator.changed = hand.wake
        threading.Thread(target=_run, args=(actuator, hand), daemon=True).start()
    limit_ns = clock.now_ns() + _LIMIT_NS
    while (left := [k for k in journal.touched() if k[0] in {a.uuid for a in actuators}]) and clock.now_ns() < limit_ns:
        waiter.wait_until(clock.now_ns() + NS // 100)
        for actuator in actuators:
            actuator.overdue(clock.now_ns())
    for uuid, control in journal.touched():
        print(f"powerd-hw: {uuid} {control.value}: not restored, run restore again", file=sys.stderr)
    waiter.close()
    sys.stdout.flush()
    if left:
        os._exit(EXIT_TEMPFAIL)  # a thread may hang in the driver: leave without waiting for it
    return EXIT_TEMPFAIL if journal.touched() else EXIT_OK


def _run(actuator: Actuator, waiter: Waiter) -> None:
    while actuator.unsettled():
        waiter.wait_until(actuator.step())
    waiter.close()


def _ignore(outcome: Outcome) -> None:
    """Nobody is there to be told of outcomes; the lines below say what happened."""


def _say(kind: str, uuid: str, subject: str, detail: str, **data: object) -> None:
    print(f"{kind} {uuid} {detail}", file=sys.stdout if kind == "restored" else sys.stderr, flush=True)


def hand_over(config: Config, clock: Clock, config_file: Path | None) -> int:
    """Leave the mark and a process that restores when the mark ends and no new powerd-hw serves."""
    directory = journal_dir(config)
    prepare_directory(directory)
    handover.leave(directory, clock.now_ns())
    command = [sys.executable, "-I", "-m", "powerd.hw", "restore", "--after-hand-over"]
    subprocess.Popen(
        command + (["--config", str(config_file.absolute())] if config_file else []),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip
    print("powerd-hw: settings stay for 10 s: stop the old powerd-hw and start the new one now")
    return EXIT_OK
