"""Replica counts follow a plan by start, wait, leave the routes, drain, stop; and what must hold whatever happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_integrations.fleet.handover import Handover, Limits, Wanted, step
from powerd_integrations.fleet.published import Group
from powerd_policies.dynamollm.fleet import FleetEvent

OLD, NEW = Group("LL", 8), Group("LL", 4)
ROUTES = {"LL": ("LL",)}


@dataclass
class Fleet:
    """An autoscaler that follows the published counts as fast as ``start_s`` and ``stop_s`` allow."""

    limits: Limits
    start_s: float = 3.0
    stop_s: float = 1.0
    now_s: float = 0.0
    state: Handover = field(default_factory=Handover)
    serving: dict[Group, int] = field(default_factory=dict)
    coming: list[tuple[float, Group]] = field(default_factory=list)
    going: list[tuple[float, Group]] = field(default_factory=list)
    events: list[FleetEvent] = field(default_factory=list)
    broken: frozenset[Group] = frozenset()  # never start

    def tick(self, wanted: Wanted, *, frozen: bool = False) -> None:
        self.now_s += 1.0
        for at_s, group in [row for row in self.coming if row[0] <= self.now_s]:
            self.coming.remove((at_s, group))
            self.serving[group] = self.serving.get(group, 0) + 1
        self.going = [row for row in self.going if row[0] > self.now_s]
        self.state, events = step(self.state, wanted, dict(self.serving), self.now_s, self.limits, frozen=frozen)
        self.events += events
        for group, count in self.state.desired.items():
            starting = [row for row in self.coming if row[1] == group]
            while self.serving.get(group, 0) > count:
                self.serving[group] -= 1
                self.going.append((self.now_s + self.stop_s, group))
            for row in starting[: max(0, len(starting) + self.serving.get(group, 0) - count)]:
                self.coming.remove(row)
            while self.serving.get(group, 0) + sum(row[1] == group for row in self.coming) < count:
                late = 1e9 if group in self.broken else self.now_s + self.start_s
                self.coming.append((late, group))

    def alive(self) -> dict[Group, int]:
        return {group: count for group, count in self.serving.items() if count}


def test_the_new_one_serves_before_the_old_one_leaves_and_leaves_before_it_ends() -> None:
    fleet, story = Fleet(Limits(16, settle_s=2.0)), []
    for tick in range(20):
        fleet.tick(Wanted({OLD: 1} if tick < 5 else {NEW: 1}, ROUTES))
        story.append((tuple(sorted(fleet.alive())), fleet.state.routes["LL"]))
    kept = [now for before, now in zip([None, *story], story, strict=False) if now != before]
    assert kept == [
        ((), ()),
        ((OLD,), (OLD,)),
        ((NEW, OLD), (NEW,)),
        ((NEW,), (NEW,)),
    ]


def test_growing_is_not_delayed_and_shrinking_of_one_kind_neither() -> None:
    fleet = Fleet(Limits(96))
    fleet.tick(Wanted({OLD: 3}, ROUTES))
    assert fleet.state.desired[OLD] == 3
    for _ in range(5):
        fleet.tick(Wanted({OLD: 3}, ROUTES))
    fleet.tick(Wanted({OLD: 1}, ROUTES))
    assert fleet.state.desired[OLD] == 1


def test_stale_input_shrinks_nothing() -> None:
    fleet = Fleet(Limits(96))
    for _ in range(6):
        fleet.tick(Wanted({OLD: 3}, ROUTES))
    for _ in range(10):
        fleet.tick(Wanted({OLD: 1}, ROUTES), frozen=True)
    assert fleet.state.desired[OLD] == 3
    fleet.tick(Wanted({OLD: 4}, ROUTES), frozen=True)
    assert fleet.state.desired[OLD] == 4, "but it may grow"


def test_without_room_for_both_the_old_ones_give_way_in_waves() -> None:
    fleet = Fleet(Limits(96, settle_s=2.0, wave_ratio=0.25))
    for _ in range(6):
        fleet.tick(Wanted({OLD: 12}, ROUTES))
    least = 12 * 8
    for _ in range(60):
        fleet.tick(Wanted({NEW: 24}, ROUTES))
        least = min(least, sum(group.tp * count for group, count in fleet.alive().items()))
    assert fleet.alive() == {NEW: 24}
    assert least >= 96 * 0.7, "at most a wave of a quarter is away at a time"


def test_one_instance_without_room_for_another_is_replaced_all_the_same_and_said() -> None:
    fleet = Fleet(Limits(8))
    for _ in range(6):
        fleet.tick(Wanted({OLD: 1}, ROUTES))
    for _ in range(15):
        fleet.tick(Wanted({NEW: 2}, ROUTES))
    assert fleet.alive() == {NEW: 2}
    assert [event.kind for event in fleet.events] == ["gate"]


def test_where_a_new_one_fits_beside_the_last_old_one_somebody_serves_all_the_time() -> None:
    last, news = Group("LL", 2), Group("LL", 4)
    fleet, story = Fleet(Limits(8, settle_s=2.0)), []
    for _ in range(6):
        fleet.tick(Wanted({last: 1}, ROUTES))
    for _ in range(20):
        fleet.tick(Wanted({news: 2}, ROUTES))
        story.append((fleet.alive(), fleet.state.routes["LL"]))
    kept = [now for before, now in zip([None, *story], story, strict=False) if now != before]
    assert kept == [
        ({last: 1}, (last,)),
        ({last: 1, news: 1}, (news,)),
        ({news: 1}, (news,)),
        ({news: 2}, (news,)),
    ]
    assert fleet.events == []


def test_a_group_that_ends_gets_no_more_requests_however_long_it_drains() -> None:
    last, news = Group("LL", 2), Group("LL", 4)
    fleet = Fleet(Limits(8, settle_s=2.0), start_s=1e9)
    fleet.serving = {last: 1, news: 1}
    fleet.state = Handover({last: 1, news: 1}, {"LL": (last, news)})
    fleet.tick(Wanted({news: 2}, ROUTES))
    assert fleet.state.routes["LL"] == (news,)
    while fleet.state.desired[last]:
        fleet.tick(Wanted({news: 2}, ROUTES))
    fleet.serving[last] = 1  # it still finishes what runs, and says that it serves
    fleet.tick(Wanted({news: 2}, ROUTES))
    assert fleet.state.routes["LL"] == (news,), "although one of two new ones has to wait for its GPUs"
    fleet.serving = {last: 1}
    fleet.tick(Wanted({news: 2}, ROUTES))
    assert not fleet.state.routes["LL"], "requests wait for the new ones rather than keep the old one from ending"


def test_what_gave_way_to_replicas_that_never_come_is_started_again() -> None:
    fleet = Fleet(Limits(8, start_timeout_s=10.0, retry_s=1e6), broken=frozenset({NEW}))
    for _ in range(6):
        fleet.tick(Wanted({OLD: 1}, ROUTES))
    for _ in range(25):
        fleet.tick(Wanted({NEW: 2}, ROUTES))
    assert fleet.alive() == {OLD: 1}
    assert fleet.state.routes["LL"] == (OLD,)
    assert [event.kind for event in fleet.events] == ["gate", "rollback"]


def test_replicas_that_do_not_come_up_are_given_up_and_the_old_ones_stay() -> None:
    fleet = Fleet(Limits(96, start_timeout_s=10.0, retry_s=30.0), broken=frozenset({NEW}))
    for _ in range(6):
        fleet.tick(Wanted({OLD: 2}, ROUTES))
    for _ in range(25):
        fleet.tick(Wanted({NEW: 4}, ROUTES))
    assert fleet.alive() == {OLD: 2}
    assert fleet.state.desired[NEW] == 0, "not tried all the time"
    assert fleet.state.routes["LL"] == (OLD,)
    assert [event.kind for event in fleet.events] == ["rollback"]
    fleet.broken, fleet.coming = frozenset(), []
    for _ in range(40):
        fleet.tick(Wanted({NEW: 4}, ROUTES))
    assert fleet.alive() == {NEW: 4}, "tried again later"


def test_a_pool_that_is_merged_waits_for_the_one_that_takes_its_requests() -> None:
    small = Group("SS", 2)
    fleet = Fleet(Limits(96, settle_s=1.0))
    both = Wanted({small: 2, OLD: 1}, {"SS": ("SS", "LL"), "LL": ("LL",)})
    for _ in range(6):
        fleet.tick(both)
    merged = Wanted({OLD: 2}, {"SS": ("LL",), "LL": ("LL",)})
    fleet.tick(merged)
    assert fleet.state.desired[small] == 2, "until the second of LL serves"
    for _ in range(10):
        fleet.tick(merged)
    assert fleet.alive() == {OLD: 2}
    assert fleet.state.routes["SS"] == (OLD,)


GROUPS = [Group(pool, tp) for pool in ("SS", "LL") for tp in (2, 4, 8)]
FLEETS = st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 3), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FLEETS, st.integers(1, 25), st.booleans()), min_size=1, max_size=6), st.integers(24, 96))
def test_whatever_is_wanted_gpus_suffice_and_a_pool_that_served_serves(
    plans: list[tuple[dict[Group, int], int, bool]], gpus: int
) -> None:
    fleet = Fleet(Limits(gpus, settle_s=1.0, start_timeout_s=1e6))
    for counts, ticks, frozen in plans:
        fitting: dict[Group, int] = {Group("LL", 8): 1}  # somebody can always take the rest
        for group, most in counts.items():
            room = (gpus - sum(g.tp * n for g, n in fitting.items())) // group.tp
            fitting[group] = max(fitting.get(group, 0), min(most, room))
        if sum(g.tp * n for g, n in fitting.items()) > gpus:
            continue
        pools = tuple(dict.fromkeys(group.pool for group, n in fitting.items() if n))
        wanted = Wanted(fitting, {"SS": tuple(sorted(pools, reverse=True)), "LL": ("LL",)})
        for _ in range(ticks):
            had = {group.pool for group, n in fleet.serving.items() if n}
            fleet.tick(wanted, frozen=frozen)
            assert sum(group.tp * n for group, n in fleet.state.desired.items()) <= gpus
            if "LL" in had and not any(event.kind == "gate" for event in fleet.events):
                assert any(group.pool == "LL" and n for group, n in fleet.serving.items()), "LL never goes without"
    for _ in range(150):
        fleet.tick(wanted)
    assert fleet.alive() == {group: n for group, n in fitting.items() if n}, "it arrives in the end"
