"""Whatever a beat socket says, a plan's clock is that of the successor or the safe one: the rule against a plain model."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from powerd.clock import NEVER_NS, NS
from powerd.hw.frames import FrameError
from powerd.hw.plan import BEAT, SAFE_INDEX, TRANSITIONS, Beat, Follower, Order, order_of
from powerd.model import ClockPlan, PlanState

NUMBER = 7
ITERATION_S = 2.0


def follower(count: int, safe: int | None = 5) -> Follower:
    clocks = tuple(100 + n for n in range(count))
    return Follower(Order(NUMBER, "l1", ClockPlan("p", "GPU", clocks, safe, ITERATION_S, 2.0)))


beat = st.tuples(st.integers(0, 4), st.one_of(st.integers(0, 4), st.just(SAFE_INDEX)))
messages = st.one_of(
    beat.map(lambda b: BEAT.pack(NUMBER, *b)), beat.map(lambda b: BEAT.pack(NUMBER + 1, *b)), st.binary(max_size=20)
)
happenings = st.one_of(messages, st.integers(0, 6).map(lambda seconds: seconds * NS))


@given(st.integers(1, 4), st.lists(happenings, max_size=40))
def test_the_clock_is_that_of_the_successor_or_the_safe_one(count: int, story: list[bytes | int]) -> None:
    plan, now_ns = follower(count), 1_000 * NS
    at: tuple[int, int] | None = None  # the model: where the plan is while it runs
    last: int | None = None  # the step that was followed last
    since_ns = 0
    for what in story:
        if isinstance(what, int):
            now_ns += what
            if now_ns >= plan.late_ns:
                plan.happen(Beat.LATE)
            if at is not None and now_ns - since_ns >= 2 * ITERATION_S * NS:
                at = None
        else:
            plan.take(what, now_ns)
            number, step, index = BEAT.unpack(what) if len(what) == BEAT.size else (0, 0, 0)
            begins = index == 0 and (last is None or step > last) and (at is None or at[1] == count - 1)
            follows = at is not None and (step, index) == (at[0], at[1] + 1) and index < count
            if number == NUMBER and index != SAFE_INDEX and (begins or follows):
                at, last, since_ns = (step, index), step, now_ns
            else:
                at = None
        assert plan.clock_mhz == (5 if at is None else 100 + at[1])
        assert (plan.state is PlanState.RUNNING) == (at is not None)
        assert (plan.late_ns != NEVER_NS) == (at is not None)


@given(st.lists(messages, max_size=40))
def test_every_message_is_counted_once_and_trouble_comes_once_until_a_step_begins(story: list[bytes]) -> None:
    plan, troubles = follower(3), 0
    for message in story:
        what, changed = plan.take(message, NS)
        assert not changed or what in (Beat.WRONG, Beat.ASKED, Beat.BEGIN)
        troubles += what is Beat.WRONG
    assert sum(plan.beats.values()) == len(story)
    assert troubles == plan.beats[Beat.WRONG] <= plan.beats[Beat.BEGIN] + 1


@given(st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_a_training_loop_that_counts_its_steps_is_followed_to_the_letter(count: int, gaps: list[int]) -> None:
    plan, step = follower(count), 0
    for gap in gaps:
        for index in range(count):
            what, _ = plan.take(BEAT.pack(NUMBER, step, index), NS)
            assert what is (Beat.NEXT if index else Beat.BEGIN)
            assert plan.clock_mhz == 100 + index
        step += gap


def test_the_end_of_a_plan_is_the_end() -> None:
    assert not [key for key in TRANSITIONS if key[0] is PlanState.ENDED]
    plan = follower(2)
    plan.state = PlanState.ENDED
    plan.take(BEAT.pack(NUMBER, 1, 0), NS)
    assert plan.state is PlanState.ENDED


def test_without_a_safe_clock_nothing_is_set_beside_the_beats() -> None:
    plan = follower(2, safe=None)
    assert plan.clock_mhz is None
    plan.take(BEAT.pack(NUMBER, 1, 0), NS)
    assert plan.clock_mhz == 100
    plan.happen(Beat.CLOSED)
    assert plan.clock_mhz is None


def test_a_worker_after_a_dead_one_begins_at_the_safe_clock_quietly() -> None:
    plan = Follower(Order(NUMBER, "l1", ClockPlan("p", "GPU", (100, 101), 5, 1.0), why="restarted"))
    for index in (1, 0, 1):
        plan.take(BEAT.pack(NUMBER, 3, index), NS)
    assert plan.clock_mhz == 101
    assert plan.beats == {Beat.IGNORED: 1, Beat.BEGIN: 1, Beat.NEXT: 1}


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("do", "number", "plan", "id")), inner, max_size=4)
    ),
    max_leaves=12,
)
fields = {"id": "p", "uuid": "g", "clocks_mhz": [100], "safe_mhz": None, "iteration_s": 1.0, "late_factor": 2.0}
rows = st.fixed_dictionaries(
    {"do": st.sampled_from(("arm", "disarm")) | json, "number": st.integers(1, 9) | json},
    optional={
        "lease": st.just("l1") | json, "why": st.just("") | json,
        "plan": json | st.fixed_dictionaries({name: st.just(value) | json for name, value in fields.items()}),
    },
)  # fmt: skip


@given(json | rows)
def test_whatever_comes_over_the_wire_is_an_order_or_a_frame_error(content: object) -> None:
    try:
        order = order_of(content)
    except FrameError:
        return
    if isinstance(order, Order):
        Follower(order)
        assert all(type(clock) is int for clock in order.plan.clocks_mhz)
        struct.pack("<I", order.number)
