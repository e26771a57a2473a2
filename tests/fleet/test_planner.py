"""The live planner: what it shows a controller, what it publishes, and what it does when nothing can be trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from powerd_integrations.fleet.handover import Limits
from powerd_integrations.fleet.observed import Waited
from powerd_integrations.fleet.planner import LivePlanner, PlannerOptions
from powerd_integrations.fleet.published import Group, PlanFile, from_json, to_json
from powerd_policies.dynamollm.fleet import ClassLoad, InstanceLoad
from tests.fleet.scripted import LL8, Clock, Scripted, planner, replica, report


def test_a_controller_sees_windows_that_tile_time() -> None:
    clock, controller = Clock(), Scripted()
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    for second in range(1, 16):
        clock.s += 1.0
        live.add_arrivals(report(second + 1, requests=2))
        live.tick()
    windows = [(state.now_s, state.window_s, state.arrivals["ML"].requests) for state in controller.seen]
    assert windows == [(101.0, 1.0, 2), (106.0, 5.0, 10), (111.0, 5.0, 10)]
    assert controller.seen[1].arrivals["ML"] == ClassLoad(10, 5000, 4000)
    assert controller.seen[1].arrivals["SS"] == ClassLoad()


def test_a_report_that_comes_twice_counts_once() -> None:
    live = planner(Scripted(), Clock())
    assert live.add_arrivals(report(7, requests=3))
    assert not live.add_arrivals(report(7, requests=3))
    assert live.add_arrivals(report(1, requests=1, router="r2"))
    assert live.figures().requests == {"ML": 4}


def test_before_any_router_reports_the_controllers_first_plan_is_published() -> None:
    clock = Clock()
    live = planner(Scripted(ll8=2), clock)
    plan = live.tick()
    assert plan.replicas("LL", 8) == 2
    assert plan.held == "no router has reported yet"


def test_a_planner_that_starts_again_takes_nobody_away_that_serves() -> None:
    """Routers and autoscalers read it at once; replicas report within a second or two."""
    clock = Clock()
    old = Group("LL", 4)
    options = PlannerOptions(Limits(96, settle_s=1.0), look_s=3.0)
    live = LivePlanner(Scripted(ll8=2), options, groups={LL8: (0, 12), old: (0, 24)}, now_s=clock, unix_s=clock)
    assert live.plan().replicas("LL", 4) is None, "not known is not zero"
    for second in range(1, 10):
        clock.s += 1.0
        live.add_arrivals(report(second))
        if second >= 2:
            live.add_instances([replica(f"i{n}", group=old) for n in range(3)])
        plan = live.tick()
        assert plan.replicas("LL", 4) in (None, 3)
    assert plan.replicas("LL", 8) == 2
    assert plan.routes["ML"] == (old,), "until the new ones serve"


def test_when_no_router_reports_any_more_the_last_plan_is_held() -> None:
    clock, controller = Clock(), Scripted(ll8=3)
    live = planner(controller, clock)
    live.add_arrivals(report(1, requests=5))
    live.tick()
    controller.counts = {LL8: 1}
    asked = len(controller.seen)
    clock.s += 11.0
    plan = live.tick()
    assert (plan.replicas("LL", 8), len(controller.seen)) == (3, asked)
    assert "load is not known" in plan.held
    assert plan.decided_unix_s == 1e9 + 100.0
    assert plan.published_unix_s == 1e9 + 111.0
    live.add_arrivals(report(2, requests=1))
    clock.s += 1.0
    plan = live.tick()
    assert (plan.held, plan.replicas("LL", 8)) == ("", 1)
    assert controller.seen[-1].window_s == pytest.approx(1.0), "what was not seen is not counted as no load"


def test_stale_metrics_of_a_replica_freeze_scaling_down_until_it_is_gone() -> None:
    clock, controller = Clock(), Scripted(ll8=2)
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    live.add_instances([replica("i1"), replica("i2")])
    live.tick()
    for second in range(2, 14):
        clock.s += 1.0
        controller.counts = {LL8: 1 if clock.s > 111.0 else 2}
        live.add_arrivals(report(second))
        live.add_instances([replica("i1")])
        plan = live.tick()
    assert plan.replicas("LL", 8) == 2
    assert "stale" in plan.held
    for second in range(14, 20):
        clock.s += 1.0
        live.add_arrivals(report(second))
        live.add_instances([replica("i1")])
        live.tick()
    assert live.plan().replicas("LL", 8) == 1, "i2 is gone, what is left is known"


def test_a_replica_that_reports_old_metrics_serves_and_is_never_gone() -> None:
    clock, controller = Clock(), Scripted(ll8=1)
    live = planner(controller, clock)
    for second in range(1, 60):
        clock.s += 1.0
        live.add_arrivals(report(second))
        live.add_instances([replica("i1", age_s=float(second))])
        plan = live.tick()
    assert [one.id for one in plan.serving] == ["i1"]
    assert plan.routes["ML"] == (LL8,)
    assert "stale" in plan.held
    assert controller.seen[-1].instances[0].load.age_s > 50


def test_an_old_report_is_stale_when_it_comes() -> None:
    clock, controller = Clock(), Scripted(ll8=1)
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    live.add_instances([replica("i1", age_s=12.0)])
    assert "stale" in live.tick().held


def test_a_controller_that_fails_leaves_the_last_plan_and_is_asked_again() -> None:
    clock, controller = Clock(), Scripted(ll8=2)
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    live.tick()
    controller.error = ZeroDivisionError("no profile")
    for second in range(2, 14):
        clock.s += 1.0
        live.add_arrivals(report(second))
        plan = live.tick()
    assert plan.replicas("LL", 8) == 2
    assert live.figures().failures == 2
    assert {event.kind for event in live.events()} == {"error"}
    assert "ZeroDivisionError: no profile" in live.events()[0].detail


def test_the_version_rises_when_something_changes_and_only_then() -> None:
    clock, controller = Clock(), Scripted()
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    versions = []
    for second in range(2, 12):
        clock.s += 1.0
        live.add_arrivals(report(second))
        versions.append(live.tick().version)
    assert versions == [1] * 10
    controller.counts = {LL8: 2}
    clock.s += 5.0
    assert live.tick().version == 2


def test_the_file_is_the_plan_and_a_reader_survives_everything(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "plan.json"
    reader = PlanFile(path)
    assert reader.plan() is None
    live = planner(Scripted(ll8=2), clock, plan_file=path)
    live.add_arrivals(report(1))
    live.add_instances([replica("i1")])
    plan = live.tick()
    assert reader.plan() == plan == from_json(json.loads(json.dumps(to_json(plan))))
    for garbage in ("", "{", '{"schema": 2}', "[]", '{"schema": 1, "version": "x"}'):
        path.write_text(garbage)
        assert reader.plan() == plan
        assert reader.error
    path.unlink()
    assert reader.plan() == plan
    assert plan.age_s(1e9 + 130.0) == 30.0, "and says how old it is"
    live.tick()
    assert reader.plan() == live.plan()
    assert reader.error == ""


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    live = planner(Scripted(ll8=2), Clock(), plan_file=tmp_path / "gone" / "plan.json")
    assert live.tick().replicas("LL", 8) == 2


def test_bounds_of_a_group_hold_and_what_they_cut_is_said_once() -> None:
    clock, controller = Clock(), Scripted(ll8=20)
    live = planner(controller, clock)
    controller.counts[Group("SS", 2)] = 3
    for second in range(1, 13):
        clock.s += 1.0
        live.add_arrivals(report(second))
        plan = live.tick()
    assert plan.desired == {LL8: 12}
    (event,) = [event for event in live.events() if event.kind == "infeasible"]
    assert event.detail == "LL-tp8: 20 wanted, but max_replicas of the group is 12; SS-tp2: wanted, but no group of this fleet"
    controller.counts[LL8] = 12
    clock.s += 5.0
    live.add_arrivals(report(13))
    live.tick()
    controller.counts[LL8] = 13
    clock.s += 5.0
    live.add_arrivals(report(14))
    live.tick()
    assert [event.detail for event in live.events() if event.kind == "infeasible"][1:] == [
        "LL-tp8: 13 wanted, but max_replicas of the group is 12"
    ], "again, because there was room between"


def test_what_waits_at_an_instance_is_told_by_routers_where_its_engine_does_not() -> None:
    clock, controller = Clock(), Scripted()
    live = planner(controller, clock)
    live.add_instances([replica("silent"), replica("telling"), replica("idle")])
    live.add_instances([replace(replica("silent"), load=InstanceLoad(running=3, queued=1, oldest_wait_s=None))])
    for router, requests in (("r1", 4), ("r2", 2)):
        told = {name: Waited(requests, 100 * requests, 1.5 * requests) for name in ("silent", "telling", "gone")}
        live.add_arrivals(replace(report(1, router=router), waiting=told))
    live.tick()
    loads = {state.id: state.load for state in controller.seen[0].instances}
    silent = loads["silent"]
    assert (silent.running, silent.queued, silent.queued_prompt_tokens, silent.oldest_wait_s) == (3, 6, 600, 6.0)
    assert (loads["telling"].queued, loads["telling"].oldest_wait_s) == (0, 0.0), "the engine knows better"
    clock.s += 6.0
    live.add_arrivals(replace(report(2, router="r1")))
    live.add_instances([replace(replica("silent"), load=InstanceLoad(running=3, oldest_wait_s=None))])
    live.tick()
    (later,) = (state.load for state in controller.seen[1].instances if state.id == "silent")
    assert (later.queued, later.oldest_wait_s) == (2, 3.0), "as each router said last"


def test_what_the_ladder_wants_is_published_and_what_was_done_is_said_once() -> None:
    clock, controller = Clock(), Scripted()
    live = planner(controller, clock)
    controller.resteered = frozenset({"i1"})
    live.add_arrivals(report(1))
    plan = live.tick()
    assert (plan.resteered, plan.reordered) == (frozenset({"i1"}), frozenset({"i1", "i2"}))
    assert plan.shed_after_s == {"i1": 2.5}
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan
    live.add_arrivals(replace(report(2), resteered={"i1": 3}, rejected={"i1": 1, "i2": 2}))
    live.add_arrivals(replace(report(2), resteered={"i1": 3}))  # sent again: counted once
    for _ in range(2):
        clock.s += 5.0
        live.add_arrivals(report(int(clock.s)))
        live.tick()
    assert [(event.subject, event.detail) for event in live.events() if event.kind == "emergency"] == [
        ("i1", "3 waiting requests were sent elsewhere, 1 were rejected"),
        ("i2", "0 waiting requests were sent elsewhere, 2 were rejected"),
    ]
    assert (live.figures().resteered, live.figures().rejected) == (3, 3)


def test_on_a_load_that_is_not_known_any_more_nobody_is_rejected() -> None:
    clock, controller = Clock(), Scripted()
    controller.resteered = frozenset({"i1"})
    live = planner(controller, clock)
    live.add_arrivals(report(1))
    assert live.tick().shed_after_s
    clock.s += 11.0
    held = live.tick()
    assert "load is not known" in held.held
    assert (held.shed_after_s, held.resteered, held.reordered) == ({}, frozenset(), frozenset())


def test_a_plan_of_an_older_planner_can_be_read() -> None:
    document = to_json(planner(Scripted(), Clock()).tick())
    del document["resteered"], document["reordered"]
    assert from_json(document).resteered == from_json(document).reordered == frozenset()
