"""What clock a replica may have: the table of states, and the ladder from the full clock down and back up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.engineload import Figures, LoadWindow
from powerd.enginepage import parse
from powerd.governor import RELAX_S, STEP_SHARE, TRANSITIONS, Governor, Sign, State
from powerd.policytable import ClockDecision, InstanceLoad, Slo, instance_policy
from powerd.replicatypes import SloSpec
from tests.replicas.engine import Engine

CLOCKS = tuple(range(210, 1981, 15))
SLO = SloSpec(0.5, 0.1)


@dataclass
class Fixed:
    """A policy that always says the same, and keeps what it was told."""

    mhz: int = 1200
    max_mhz: int = 1980
    loads: list[InstanceLoad] = field(default_factory=list)

    def clock(self, now_s: float, load: InstanceLoad) -> ClockDecision:
        self.loads.append(load)
        return ClockDecision(self.mhz, "said so")


class Rig:
    def __init__(self, policy: Fixed | None = None, **options: float) -> None:
        self.policy = policy or Fixed()
        self.engine = Engine(running=1)
        self.window = LoadWindow(SLO, window_s=2)
        self.now_s = 0.0
        settings: dict[str, Any] = {"stale_s": 4.0, "good_scrapes": 3, "park_after_s": 10.0, **options}
        self.governor = Governor(self.policy, SLO, CLOCKS, now_s=0.0, **settings)

    def good(self, times: int = 1, ttft: float = 0.2) -> int | None:
        for _ in range(times):
            self.now_s += 1
            if self.engine.running:
                self.engine.ttft.append(ttft)
            ceiling = self.governor.good(self.now_s, self.figures())
        return ceiling.clock_mhz

    def state(self) -> State:
        return self.governor.state

    def figures(self) -> Figures:
        return self.window.add(round(self.now_s * 1e9), parse(self.engine.page()))


def test_every_sign_in_every_state_leads_somewhere_and_only_good_pages_lead_to_control() -> None:
    for state, sign in itertools.product(State, Sign):
        after = TRANSITIONS.get((state, sign), state)
        if sign in (Sign.GARBAGE, Sign.SILENT):
            assert after in (State.STALE, State.STARTING)
        else:
            assert after in (State.FRESH, State.IDLE)


def test_a_new_replica_has_the_full_clock_until_enough_good_pages_came() -> None:
    rig = Rig()
    assert rig.governor.ceiling.clock_mhz is None
    assert [rig.good() for _ in range(4)] == [None, None, 1200, 1200]
    assert rig.state() is State.FRESH


def test_what_the_engine_says_reaches_the_policy() -> None:
    rig = Rig()
    rig.engine.running, rig.engine.waiting, rig.engine.kv = 4, 2, 0.5
    rig.good(3)
    load = rig.policy.loads[-1]
    assert (load.running, load.queued, load.kv_used_ratio, load.requests_per_s) == (4, 2, 0.5, 1.0)
    assert (load.ttft_p99_s, load.tbt_p99_s) == (None, None), "the edge of a bucket is no measured gap"
    assert load.queued_prompt_tokens is None, "no engine tells"
    assert load.oldest_wait_s is None


def test_one_absurd_page_means_full_clock_and_several_good_ones_the_way_back() -> None:
    rig = Rig()
    rig.good(5)
    assert rig.governor.garbage("its buckets fall").clock_mhz is None
    assert rig.state() is State.STALE
    assert rig.governor.ceiling.reason == "its buckets fall"
    assert [rig.good() for _ in range(3)] == [None, None, 1200]
    assert rig.state() is State.FRESH
    rig.governor.garbage("again")
    rig.good(2)
    rig.governor.garbage("and again")
    assert [rig.good() for _ in range(3)] == [None, None, 1200], "good pages count in a row only"


def test_silence_means_full_clock_after_the_stale_time_and_at_once_while_parked() -> None:
    rig = Rig()
    rig.good(5)
    assert rig.governor.silent(rig.now_s + 3.9, "no answer").clock_mhz == 1200
    assert rig.state() is State.FRESH
    assert rig.governor.silent(rig.now_s + 4.0, "no answer").clock_mhz is None
    assert rig.state() is State.STALE
    rig = Rig()
    rig.engine.running = 0
    rig.good(12)
    assert rig.state() is State.IDLE
    assert rig.governor.silent(rig.now_s + 0.5, "no answer in time").clock_mhz is None, "who knows what has come meanwhile"


def test_a_replica_with_nothing_to_do_is_idle_after_a_while_and_wakes_with_the_first_request_seen() -> None:
    rig = Rig()
    rig.good(3)
    rig.engine.running = 0
    rig.good(9)
    assert rig.state() is State.FRESH
    rig.good(1)
    assert rig.state() is State.IDLE
    rig.engine.waiting = 1
    rig.good(1)
    assert rig.state() is State.FRESH


def test_a_ceiling_is_never_below_what_was_decided_and_the_highest_is_none() -> None:
    for decided, held in ((1200, 1200), (1201, 1215), (1965, 1965), (1966, None), (1980, None), (9999, None), (1, 210)):
        rig = Rig(Fixed(decided, max_mhz=max(1980, decided)))
        assert rig.good(3) == held, decided


def test_gpus_whose_clock_cannot_be_set_are_never_held() -> None:
    rig = Rig()
    rig.governor = Governor(Fixed(), SLO, (), now_s=0, stale_s=4, good_scrapes=1, park_after_s=1)
    assert rig.good(3) is None


def test_a_broken_promise_is_the_full_clock_and_later_decisions_keep_further_away_from_it() -> None:
    rig = Rig()
    assert rig.good(3) == 1200
    assert rig.good(1, ttft=0.9) is None
    assert rig.state() is State.FRESH
    assert rig.governor.ceiling.reason == "full clock: p99 of TTFT is up to 1 s, the SLO 0.5 s"
    assert rig.good(1) is None, "still within the window"
    more_mhz = round(STEP_SHARE * 1980)
    assert rig.good(3) == 1305 >= 1200 + more_mhz
    assert "99 MHz since the SLO was missed" in rig.governor.ceiling.reason
    assert rig.good(round(RELAX_S)) == 1200, "forgotten after a while without another"


def test_a_promise_broken_at_the_full_clock_teaches_nothing_about_lower_ones() -> None:
    rig = Rig(Fixed(1980))
    rig.good(3)
    rig.good(1, ttft=0.9)
    rig.policy.mhz = 1200
    assert rig.good(5) == 1200


def test_an_idle_replica_is_parked_whatever_its_last_requests_felt() -> None:
    rig = Rig(park_after_s=1.0)
    rig.good(3)
    rig.good(1, ttft=0.9)
    rig.engine.running = 0
    assert rig.good(2) == 1305, "held, and further up than before"
    assert rig.state() is State.IDLE


def test_without_a_profile_the_clock_is_only_ever_parked() -> None:
    policy = instance_policy(None, "", 1, Slo(0.5, 0.1), CLOCKS, 5.0, 1.0)
    busy, empty = InstanceLoad(running=1), InstanceLoad()
    assert policy.clock(0, busy).clock_mhz == 1980
    assert policy.clock(1, empty).clock_mhz == 1980
    assert policy.clock(5.9, empty).clock_mhz == 1980
    assert policy.clock(6, empty).clock_mhz == 990
    assert policy.clock(7, busy).clock_mhz == 1980


@settings(deadline=None)
@given(st.lists(st.sampled_from(["good", "idle", "missed", "garbage", "silent", "restart"]), max_size=60))
def test_a_clock_is_only_ever_lowered_on_enough_good_pages_in_a_row(story: list[str]) -> None:
    rig = Rig(park_after_s=2.0)
    good = 0
    for step in story:
        rig.now_s += 1
        rig.engine.running = int(step != "idle")
        if step in ("good", "idle", "missed"):
            good += 1
            rig.engine.ttft.append(9.0 if step == "missed" else 0.2)
            rig.governor.good(rig.now_s, rig.figures())
        elif step == "silent":
            rig.governor.silent(rig.now_s, "no answer")
        else:
            good = 0
            rig.governor.garbage(step)
        state, clock_mhz = rig.governor.state, rig.governor.ceiling.clock_mhz
        if clock_mhz is not None:
            assert good >= 3
            assert state in (State.FRESH, State.IDLE)
            assert clock_mhz >= 1200
        if step == "missed":
            assert clock_mhz is None


def test_a_larger_chunk_needs_a_higher_clock() -> None:
    load = InstanceLoad(running=4, requests_per_s=0.5, prompt_tokens_per_s=500.0, output_tokens_per_s=50.0)

    def decided(chunk_tokens: int) -> int:
        policy = instance_policy("llama2-70b_h100", "", 8, Slo(2.0, 0.1), CLOCKS, 1.0, 1.0, chunk_tokens)
        return [policy.clock(float(second), load).clock_mhz for second in range(10)][-1]

    assert decided(512) < decided(1024) <= 1980


@pytest.mark.parametrize("profile", ["llama2-70b_h100", "llama2-70b_a100"])
def test_shipped_profiles_decide(profile: str) -> None:
    policy = instance_policy(profile, "", 4, Slo(2.0, 0.2), CLOCKS, 1.0, 1.0)
    load = InstanceLoad(running=1, requests_per_s=0.1, prompt_tokens_per_s=50.0, output_tokens_per_s=20.0, queued_prompt_tokens=0)
    decided = [policy.clock(float(second), load).clock_mhz for second in range(10)]
    assert decided[-1] < decided[0] == policy.max_mhz
