"""Kills at every boundary: one strike is one process killed at one listed point, then a look through NVML at the deadline.

Run by hand: ``python -m tests.faults.campaign --strikes 1000`` prints a table of points, strikes and the slowest restore.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from benchmarks.report import Report, write
from powerd.killpoint import KILL_POINTS
from tests.faults.rig import (
    BASELINE,
    CLIENT_DEADLINE_S,
    HW_DEADLINE_S,
    LIVE_CLOCKS,
    LIVE_LIMITS,
    POWERD_DEADLINE_S,
    BrokenPromiseError,
    Rig,
    rig,
    wait_for,
)

DEADLINE_S = {"client": CLIENT_DEADLINE_S, "powerd": POWERD_DEADLINE_S, "hw": HW_DEADLINE_S}

_NAP_S = 0.002


@dataclass
class Score:
    """What a campaign found."""

    strikes: Counter[str] = field(default_factory=Counter)
    slowest_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: list[str] = field(default_factory=list)
    unreached: set[str] = field(default_factory=set)


def settle_s(rig: Rig, died_s: float, deadline_s: float) -> float:
    """Seconds from a death until the reader first found baseline; BrokenPromiseError when that is later than the deadline.

    What this machine itself overslept meanwhile (other tests run beside this one) is taken off: it says nothing about powerd.
    """
    overslept_s = longest_read_s = 0.0
    began_s = time.monotonic()
    while True:
        read_s = time.monotonic()
        found = rig.read()
        longest_read_s = max(longest_read_s, time.monotonic() - read_s)
        took_s = time.monotonic() - died_s - overslept_s
        if found == BASELINE and took_s <= deadline_s:
            return took_s
        if took_s > deadline_s:
            raise BrokenPromiseError(
                f"{found} {took_s:.3f} s after the kill, deadline {deadline_s:g} s (looked from {began_s - died_s:.3f} s on,"
                f" longest read {longest_read_s:.3f} s, overslept {overslept_s:.3f} s); {rig.truth()}"
            )
        nap_s = time.monotonic()
        threading.Event().wait(_NAP_S)
        overslept_s += max(0.0, time.monotonic() - nap_s - 2 * _NAP_S)


def hold(rig: Rig, died_s: float, deadline_s: float) -> None:
    """At the deadline each control is at baseline, or at a value of the lease if that is still live.

    A lease that its client releases just then has what every release has: the settings go within the client's deadline.
    """
    threading.Event().wait(max(0.0, died_s + deadline_s - time.monotonic()))
    limit, clock = rig.read()
    ours = (limit == BASELINE[0] or limit in LIVE_LIMITS) and (clock == BASELINE[1] or clock in LIVE_CLOCKS)
    if ours and rig.live_leases():
        return
    if not ours:
        raise BrokenPromiseError(f"{deadline_s:g} s after the kill: limit {limit} mW, clock {clock} MHz; {rig.truth()}")
    settle_s(rig, time.monotonic(), DEADLINE_S["client"])


@dataclass(frozen=True)
class Strike:
    """Whether the point was reached at that depth and, where baseline is the promise, the seconds it took."""

    reached: bool
    restore_s: float | None = None


def strike(rig: Rig, point: str, nth: int, stay_dead: bool) -> Strike:
    """Kill at one point and look; raises BrokenPromiseError when a promise is broken."""
    victim = point.partition(".")[0]
    if victim != "client":
        before = rig.generation() if victim == "hw" else None
        rig.stop(victim)
        rig.start(victim, f"{point}:{nth}")
        wait_for(f"{point}: ready again", lambda: rig.struck or rig.ready(before))
    client = rig.run_client(f"{point}:{nth}" if victim == "client" else None)
    assert client.stdin is not None
    client.stdin.write("\n")  # goes through all its steps, to the release, unless it is killed on the way
    client.stdin.flush()

    def over() -> bool:
        return rig.struck or client.poll() is not None

    wait_for(f"{point}:{nth} or the client's end", over, 60)
    died_s = time.monotonic()
    if not rig.struck:
        rig.disarm()
        rig.end_client()
        return Strike(reached=False)
    try:
        if victim == "client":
            client.wait(10)
            return Strike(True, settle_s(rig, died_s, DEADLINE_S["client"]))
        if victim == "powerd":
            wait_for("powerd's death", lambda: not rig.units["powerd"].alive)
        if victim == "powerd" and stay_dead:
            return Strike(True, settle_s(rig, died_s, DEADLINE_S["powerd"]))
        rig.revive()  # a worker's death is its supervisor's business; a dead unit is restarted
        threading.Event().wait(0.02)
        rig.revive()
        hold(rig, died_s, DEADLINE_S[victim])
    finally:
        rig.end_client()
        rig.revive()
    return Strike(reached=True)


def campaign(strikes: int, seed: int, points: tuple[str, ...] = KILL_POINTS, quiet: bool = True) -> Score:
    """Strike every point in turn until the number is reached; the order and depth come from the seed."""
    score, dice = Score(), random.Random(seed)
    order, deepest = list(points), dict.fromkeys(points, 3)
    done = tried = 0
    with rig() as made:
        while done < strikes and tried < 2 * strikes + len(points):
            dice.shuffle(order)
            for point in order:
                if done >= strikes:
                    break
                nth = 1 if point not in score.strikes else dice.randint(1, deepest[point])
                tried += 1
                try:
                    result = strike(made, point, nth, stay_dead=dice.random() < 0.5)
                    made.revive()
                    wait_for(f"{point}: ready again, its lease gone, at baseline", made.at_rest)
                except (BrokenPromiseError, subprocess.TimeoutExpired) as error:
                    score.failures.append(f"{point}:{nth}: {error}\n{made.tail()}")
                    made.disarm()
                    made.end_client()
                    made.revive()
                    wait_for("recovery after a failure", made.at_rest)
                    continue
                if not result.reached:
                    deepest[point] = max(1, nth - 1)
                    continue
                done += 1
                score.strikes[point] += 1
                if result.restore_s is not None:
                    score.slowest_s[point] = max(score.slowest_s[point], result.restore_s)
                if not quiet:
                    took = "" if result.restore_s is None else f" {result.restore_s * 1000:.0f} ms"
                    print(f"{done:5d}/{strikes} {point}:{nth}{took}", flush=True)
    score.unreached = {point for point in points if not score.strikes[point]}
    return score


def _report(score: Score, strikes: int, seed: int) -> Report:
    """The campaign as a section of results.md."""
    made = Report("kills", "daemon, powerd-hw or client killed at every boundary in turn, settings looked at through NVML", True)
    made.command = f"python -m tests.faults.campaign --strikes {strikes} --seed {seed} --write"
    made.add("kills", sum(score.strikes.values()), "")
    made.add("broken promises", len(score.failures), "", "0")
    made.add("kill points", len(score.strikes), "")
    made.add("kill points never reached", len(score.unreached), "", "0")
    made.add("slowest restore after a death", max((s * 1000 for s in score.slowest_s.values()), default=0.0), "ms")
    return made


def main() -> int:
    """Run a campaign and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strikes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--point", action="append")
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/results.md")
    arguments = parser.parse_args()
    score = campaign(arguments.strikes, arguments.seed, tuple(arguments.point or KILL_POINTS), quiet=False)
    print(f"{sum(score.strikes.values())} kills (simulated node), {len(score.failures)} broken promises")
    for point in sorted(score.strikes):
        slowest = f"{score.slowest_s[point] * 1000:6.0f} ms" if point in score.slowest_s else "       -"
        print(f"  {point:28s} {score.strikes[point]:4d} kills, slowest restore {slowest}")
    for point in sorted(score.unreached):
        print(f"  {point:28s} never reached")
    print("\n".join(score.failures))
    if arguments.write:
        write([_report(score, arguments.strikes, arguments.seed)])
    return 1 if score.failures or score.unreached else 0


if __name__ == "__main__":
    sys.exit(main())
