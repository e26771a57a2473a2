"""The emergency ladder: up while late, down while calm, and nothing that is not in the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.sim import enginemodels
from powerd_policies.dynamollm import policies
from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.emergency import (
    LADDER,
    Emergencies,
    EmergencyError,
    Event,
    Ladder,
    Patience,
    Rung,
    advance,
    slack_of,
)
from powerd_policies.dynamollm.fleet import FleetEvent, FleetState, InstanceLoad, InstanceState
from powerd_policies.dynamollm.knobs import POLICIES
from tests.policies.dynamollm.engines import engine

SLO = Slo(0.25, 0.1)
AT = engine().table[8, 1980]


def test_a_burst_climbs_every_rung_with_an_event_each_and_calm_comes_back_the_same_way() -> None:
    fleet, now_s = Emergencies(), 0.0
    events: list[FleetEvent] = []
    for _ in range(8):
        measures = fleet.update(now_s, {"a": (-0.5, 0.25), "b": (0.2, 0.25)})
        events += measures.events
        now_s += 5.0
    assert [event.detail.split(":")[0] for event in events] == [
        "CALM -> REORDER", "REORDER -> MAX_CLOCK", "MAX_CLOCK -> RESTEER", "RESTEER -> REJECT", "REJECT -> RESHARD",
    ]  # fmt: skip
    assert measures.reordered == measures.max_clock == measures.resteered == measures.reshard == {"a"}
    assert measures.shed == {"a": 0.25}
    assert fleet.rung("b") == Rung.CALM
    down: list[FleetEvent] = []
    for _ in range(60):
        down += fleet.update(now_s, {"a": (0.2, 0.25), "b": (0.2, 0.25)}).events
        now_s += 5.0
    assert [event.detail.split(":")[0] for event in down][-1] == "REORDER -> CALM"
    assert len(down) == 5
    assert {event.kind for event in events + down} == {"emergency"}
    assert {event.subject for event in events + down} == {"a"}


def test_a_little_slack_leads_nowhere_and_a_relapse_starts_the_wait_anew() -> None:
    fleet = Emergencies(Patience(up_s=5.0, down_s=30.0))
    fleet.update(0.0, {"a": (-0.1, 1.0)})
    for n in range(1, 40):
        fleet.update(5.0 * n, {"a": (0.1, 1.0)})  # less than the share that counts
    assert fleet.rung("a") == Rung.REORDER
    for n in range(40, 46):
        fleet.update(5.0 * n, {"a": (0.9, 1.0)})
    fleet.update(230.0, {"a": (0.1, 1.0)})
    fleet.update(235.0, {"a": (0.9, 1.0)})
    assert fleet.rung("a") == Rung.REORDER
    for n in range(48, 54):
        fleet.update(5.0 * n, {"a": (0.9, 1.0)})
    assert fleet.rung("a") == Rung.CALM


def test_rungs_are_given_their_time_and_what_is_unknown_moves_nothing() -> None:
    fleet = Emergencies()
    fleet.update(0.0, {"a": (-0.1, 1.0)})
    fleet.update(1.0, {"a": (-0.1, 1.0)})
    assert fleet.rung("a") == Rung.REORDER
    fleet.update(20.0, {"a": (None, 1.0)})
    assert fleet.rung("a") == Rung.REORDER


@pytest.mark.parametrize("period_s", [0.5, 5.0])
def test_each_rung_is_given_one_period_of_the_controller(period_s: float) -> None:
    """A service that looks twice a second does not wait twenty seconds before it refuses what it cannot serve."""
    model, classes = enginemodels.load(), Classes()
    knobs = replace(POLICIES["dynamollm"], period_s=period_s)
    controller = policies.build("dynamollm", model=model, classes=classes, gpus=8, knobs=knobs)
    full = InstanceLoad(running=1, queued=60, queued_prompt_tokens=480_000, oldest_wait_s=9.0)
    states = (InstanceState("a", "LL", 8, model.max_clock_mhz, load=full),)
    refuses = [bool(controller.decide(FleetState(n * period_s, period_s, states, {}, 8)).shed) for n in range(5)]
    assert refuses == [False, False, False, True, True]


def test_an_instance_that_is_gone_leaves_with_an_event_and_comes_back_calm() -> None:
    fleet = Emergencies()
    fleet.update(0.0, {"a": (-0.1, 1.0)})
    (event,) = fleet.update(5.0, {}).events
    assert "no longer serves" in event.detail
    assert fleet.update(10.0, {"a": (0.1, 1.0)}).reordered == frozenset()


def test_a_decided_reshard_takes_the_wish_back_and_keeps_the_rest() -> None:
    fleet = Emergencies()
    for n in range(6):
        fleet.update(5.0 * n, {"a": (-0.1, 1.0), "b": (1.0, 1.0)})
    assert fleet.rung("a") == Rung.RESHARD
    (event,) = fleet.resharded(30.0, ["a", "b", "unknown"])
    assert event.subject == "a"
    measures = fleet.update(31.0, {"a": (-0.1, 1.0), "b": (1.0, 1.0)})
    assert measures.reshard == frozenset()
    assert set(measures.shed) == {"a"}


@given(st.sampled_from(Rung), st.sampled_from(Event))
def test_what_is_not_in_the_table_is_an_error_and_changes_nothing(rung: Rung, event: Event) -> None:
    ladder = Ladder("a", rung, 3.0, 2.0)
    if (rung, event) in LADDER:
        after, events = advance(ladder, event, 9.0)
        assert after.rung == LADDER[rung, event]
        assert len(events) == (after.rung != rung), "every step is logged, and only steps"
        assert (after == ladder) == (after.rung == rung)
    else:
        with pytest.raises(EmergencyError, match=rung.name):
            advance(ladder, event, 9.0)
        assert ladder == Ladder("a", rung, 3.0, 2.0)


def test_calm_instances_cannot_regain_slack_and_only_who_asked_is_answered() -> None:
    assert (Rung.CALM, Event.SLACK) not in LADDER
    assert [rung for rung in Rung if (rung, Event.RESHARDED) in LADDER] == [Rung.RESHARD]


def test_slack_is_what_the_worst_placed_has_left() -> None:
    assert slack_of(InstanceLoad(running=30), AT, SLO) == SLO.ttft_s
    assert slack_of(InstanceLoad(queued=2, queued_prompt_tokens=None), AT, SLO) is None
    early = slack_of(InstanceLoad(queued=1, queued_prompt_tokens=200), AT, SLO)
    assert early == pytest.approx(0.25 - 0.02 - 200 * AT.prefill_token_s)
    waited = slack_of(InstanceLoad(queued=1, queued_prompt_tokens=200, oldest_wait_s=0.3), AT, SLO)
    assert waited is not None
    assert waited < 0.0
