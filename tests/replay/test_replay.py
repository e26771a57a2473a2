"""Replays: every policy gets the same requests, none sees the future, and the report says what happened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from powerd.errors import ConfigError, RequestError
from powerd.sim.replay import compare, policies, report, runner, scale, scenario, search, session, signals, workload
from powerd.sim.replay.compare import Comparison
from powerd.sim.replay.generate import DAY_S, Shape, generate
from powerd.sim.replay.policies import POLICIES
from powerd.sim.replay.trace import WEEK_S, Trace
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.fleet import FleetController, FleetPlan, FleetState

ENTRY = {
    "energy_kwh", "energy_kwh_off_72w", "gpu_hours", "carbon_kg", "cost_usd", "power_p50_w", "power_p99_w", "requests",
    "rejected", "unfinished", "slo_attainment", "classes", "event_counts", "events",
}  # fmt: skip
OF_CLASS = {"requests", "slo_attainment", "ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "energy_per_request_j"}


class Recorder:
    """Writes down every decision of a controller."""

    def __init__(self, inner: FleetController) -> None:
        self.inner, self.name, self.period_s = inner, inner.name, inner.period_s
        self.seen: list[tuple[FleetState, FleetPlan]] = []

    def decide(self, state: FleetState) -> FleetPlan:
        plan = self.inner.decide(state)
        self.seen.append((state, plan))
        return plan


def recorded(name: str, comparison: Comparison) -> tuple[Recorder, runner.Outcome]:
    built = policies.build(name, comparison.scenario, comparison.workload, comparison.setting, comparison.known)
    recorder = Recorder(built.controller)
    return recorder, runner.replay(recorder, comparison.workload, comparison.setting, config=built.config)


def test_the_report_has_every_key_and_adds_up(small: Comparison) -> None:
    made = session.report(small, compare.compare(["singlepool", "dynamollm"], small))
    assert set(made) == {"trace", "scenario", "modelled", "policies"}
    for entry in made["policies"].values():
        assert set(entry) == ENTRY
        assert list(entry["classes"]) == list(NAMES)
        assert all(set(row) == OF_CLASS for row in entry["classes"].values())
        assert entry["requests"] == len(small.workload.trace)
        assert sum(row["requests"] for row in entry["classes"].values()) + small.workload.oversize == entry["requests"]
        shared_j = sum((row["energy_per_request_j"] or 0) * row["requests"] for row in entry["classes"].values())
        assert shared_j / 3.6e6 == pytest.approx(entry["energy_kwh"])
        assert 0 < entry["power_p50_w"] <= entry["power_p99_w"]
        assert entry["energy_kwh_off_72w"] >= entry["energy_kwh"]
        assert entry["cost_usd"] == pytest.approx(3.0 * entry["gpu_hours"])
        assert 0.06 < entry["carbon_kg"] / entry["energy_kwh"] < 0.6
    base, full = made["policies"]["singlepool"], made["policies"]["dynamollm"]
    assert base["energy_kwh_off_72w"] == pytest.approx(base["energy_kwh"], rel=1e-4)  # no GPU is ever off
    off_kwh = 72 * (base["gpu_hours"] - full["gpu_hours"]) / 1000
    assert full["energy_kwh_off_72w"] == pytest.approx(full["energy_kwh"] + off_kwh, rel=0.02)
    assert full["energy_kwh"] < 0.8 * base["energy_kwh"]
    assert base["slo_attainment"] > 0.99


def test_two_runs_are_the_same_and_processes_change_nothing(small: Comparison) -> None:
    one = compare.compare(["singlepool", "scalefreq"], small)
    two = compare.compare(["singlepool", "scalefreq"], small, jobs=2)
    assert [s.policy for s in two] == ["singlepool", "scalefreq"]
    assert [s.entry for s in one] == [s.entry for s in two]
    assert [s.series for s in one] == [s.series for s in two]


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "beststatic"])
def test_no_policy_sees_the_future(name: str, hour: Trace) -> None:
    """What comes after a moment changes no decision up to it."""
    whole = scale.scaled(hour.between(1000, 1700), 5.0, 1)
    cut_s = 500.0
    kept = whole.arrival_s < cut_s
    other = replace(
        whole, arrival_s=whole.arrival_s[kept], prompt_tokens=whole.prompt_tokens[kept], output_tokens=whole.output_tokens[kept]
    )
    (first, _), (second, _) = (recorded(name, session.prepare(t, session.scenario(None))) for t in (whole, other))
    upto = [[pair for pair in recorder.seen if pair[0].now_s < cut_s] for recorder in (first, second)]
    assert len(upto[0]) >= 9
    assert upto[0] == upto[1]


def test_every_policy_is_given_the_same_requests(small: Comparison) -> None:
    seen = {name: recorded(name, small)[0].seen for name in ("singlepool", "scaleinst", "dynamollm")}
    totals = {
        name: {c: sum(state.arrivals[c].requests for state, _ in pairs if c in state.arrivals) for c in NAMES}
        for name, pairs in seen.items()
    }
    assert totals["singlepool"] == totals["scaleinst"] == totals["dynamollm"]
    assert sum(totals["dynamollm"].values()) == len(small.workload.requests)


def test_only_policies_that_set_clocks_park(small: Comparison) -> None:
    for name in POLICIES[:5]:
        built = policies.build(name, small.scenario, small.workload, small.setting, small.known)
        assert (built.config.park_after_s is not None) == (name == "scalefreq")
    off = replace(small.scenario, parking=replace(small.scenario.parking, enabled=False))
    assert policies.build("dynamollm", off, small.workload, small.setting, small.known).config.park_after_s is None


def test_prompts_beyond_the_context_limit_are_rejected_and_missed(hour: Trace) -> None:
    part = hour.between(0, 120)
    text = replace(part, prompt_tokens=np.where(np.arange(len(part)) < 3, 9000, part.prompt_tokens).astype(np.int32))
    made = session.prepare(text, session.scenario(None))
    entry = compare.one("singlepool", made).entry
    assert made.workload.oversize == 3
    assert entry["rejected"] == 3
    assert entry["slo_attainment"] == pytest.approx((len(part) - 3) / len(part))
    with pytest.raises(RequestError, match="no prompt is within the context limit of 8192"):
        session.prepare(replace(part, prompt_tokens=np.full(len(part), 9000, dtype=np.int32)), session.scenario(None))


def test_late_requests_are_misses_by_the_rule_of_the_report(small: Comparison) -> None:
    """One TP8 instance for everything: most are late or unfinished, and the report says so."""
    fleet = search.Fixed(8, 1, 1980)
    setting = replace(small.setting, config=replace(small.setting.config, horizon_s=5.0))
    outcome = runner.replay(policies.controller(fleet, setting), small.workload, setting)
    entry = report.of_policy(outcome, small.workload, setting, small.scenario.prices)
    results, requests = outcome.results, small.workload.requests
    kept = 0
    for n in range(len(requests)):
        slo = setting.classes.slos[NAMES[requests.true_class[n]]]
        in_time = results.ttft_s[n] <= slo.ttft_s and not results.tbt_p99_s[n] > slo.tbt_s
        kept += bool(in_time and np.isfinite(results.finish_s[n]) and not results.rejected[n])
    assert entry["slo_attainment"] == pytest.approx(kept / (len(requests) + small.workload.oversize))
    assert entry["slo_attainment"] < 0.5
    assert entry["unfinished"] > 0


def test_the_best_fixed_fleet_is_cheaper_than_its_neighbours_that_keep_the_promises(small: Comparison) -> None:
    best = policies.best_static(small.workload, small.setting, small.known)
    assert best.feasible
    assert best.kept >= 0.99
    for other in (
        search.Fixed(best.fleet.tp, best.fleet.count - 1, best.fleet.clock_mhz),
        search.Fixed(best.fleet.tp, best.fleet.count, best.fleet.clock_mhz - 75),
        search.Fixed(8, 12, 1980),
    ):
        outcome = runner.replay(policies.controller(other, small.setting), small.workload, small.setting)
        kept, _ = report.attainment(outcome, small.workload, small.setting.classes)
        assert kept < 0.99 or outcome.results.total_j / 3.6e6 >= best.energy_kwh


def test_a_load_that_no_fixed_fleet_keeps_is_said_and_stops_nobody(hour: Trace) -> None:
    comparison = session.prepare(scale.scaled(hour.between(600, 720), 20.0), session.scenario(None))
    static, full = compare.compare(["beststatic", "dynamollm"], comparison)
    assert "no fixed fleet of 96 GPUs keeps 99% in SLO" in static.entry["fleet"]
    assert static.entry["slo_attainment"] < 0.99
    assert full.entry["event_counts"]["infeasible"] >= 1


def test_a_history_is_moved_before_the_trace_to_the_same_hours(hour: Trace) -> None:
    past = generate(hour, 2 * DAY_S, 5, Shape(requests_per_s=0.2), begin_week_s=DAY_S)
    now = generate(hour, 3600.0, 6, Shape(requests_per_s=0.2), begin_week_s=2 * DAY_S + 1800)
    made = policies.known(session.scenario(None), now, past, past)
    ends_s = [at_s for at_s, _, _ in made.history]
    assert ends_s == sorted(ends_s)
    assert -WEEK_S < ends_s[-1] <= 0
    for at_s, place in ((ends_s[0], past.begin_week_s + 300), (ends_s[-1], past.begin_week_s + 2 * DAY_S)):
        assert (now.begin_week_s + at_s) % WEEK_S == pytest.approx(place % WEEK_S)
    assert sum(load.requests for _, _, rows in made.history for load in rows.values()) <= len(past)


def test_predictions_are_made_of_the_past(hour: Trace) -> None:
    base = session.scenario(None)
    part = hour.between(2000, 2300)
    truth = workload.class_of(base.request_classes(), part.prompt_tokens, part.output_tokens)
    shares = {}
    for kind in ("trained", "noisy", "oracle"):
        with_kind = replace(base, forecast=replace(base.forecast, output_length=kind))
        made = workload.workload(part, with_kind, session.first_half(hour))
        assert np.array_equal(made.requests.routed_class // 3, truth // 3)
        shares[kind] = float((made.requests.routed_class == truth).mean())
    assert shares["oracle"] == 1.0
    assert shares["noisy"] == pytest.approx(0.8, abs=0.05)
    assert 0.4 < shares["trained"] < 0.95
    swapped = replace(part, output_tokens=part.output_tokens[::-1].copy())
    first, second = (workload.workload(t, base, session.first_half(hour)).requests for t in (part, swapped))
    assert np.array_equal(first.routed_class, second.routed_class)
    assert first.predicted_tokens is not None
    assert second.predicted_tokens is not None
    assert np.array_equal(first.predicted_tokens, second.predicted_tokens)


def test_what_was_answered_is_learned_and_only_that(hour: Trace) -> None:
    """Another service than the one that is known beforehand: guesses become better, and the future changes none of them."""
    base, past = session.scenario(None), session.first_half(hour)
    part = hour.between(0, 2400)
    other = replace(part, output_tokens=np.where(part.prompt_tokens % 2, 5, 900).astype(np.int32))
    other = replace(other, prompt_tokens=np.where(part.prompt_tokens % 2, 160, 4800).astype(np.int32))
    made = workload.workload(other, base, past).requests
    right = made.routed_class == made.true_class
    assert right[other.arrival_s > 1200].mean() > 0.95
    assert right[other.arrival_s < 300].mean() < 0.6
    late = other.arrival_s > 1200
    changed = replace(other, output_tokens=np.where(late, 60, other.output_tokens).astype(np.int32))
    again = workload.workload(changed, base, past).requests
    assert np.array_equal(again.routed_class[~late], made.routed_class[~late])
    assert again.predicted_tokens is not None
    assert made.predicted_tokens is not None
    assert np.array_equal(again.predicted_tokens[~late], made.predicted_tokens[~late])


def test_the_largest_load_is_found() -> None:
    for limit in (0.4, 1.0, 5.67, 37.0):

        def carried(load: float, limit: float = limit) -> bool:
            return load <= limit

        found = search.largest_load(carried, tolerance=0.01)
        assert limit / 1.01 <= found <= limit
    with pytest.raises(ValueError, match="not even"):
        search.largest_load(lambda load: False)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[slo]\nttft_shortt_s = 1", "s.toml:2: unknown key slo.ttft_shortt_s (did you mean 'ttft_short_s'?)"),
        ("[clusterr]\nnodes = 1", "s.toml:1: unknown section or key 'clusterr' (did you mean 'cluster'?)"),
        ("[cluster]\nnodes = 0", "s.toml:2: cluster.nodes: 0 is outside 1..10000"),
        ("[cluster]\nnodes = 1.5", "s.toml:2: cluster.nodes: expected int, got 1.5"),
        ("[forecast]\noutput_length = 'guess'", "s.toml:2: forecast.output_length: 'guess' is not one of trained, noisy, oracle"),
        ("[classes]\nprompt_short_below = 2000", "s.toml: the bounds of [classes] do not ascend"),
        ("[cluster", "s.toml:"),
    ],
)
def test_a_bad_scenario_is_refused_with_its_line(toml: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scenario.parse(toml, "s.toml")
    assert str(caught.value).startswith(said)


def test_the_reference_scenario_states_the_defaults() -> None:
    assert session.scenario(None) == scenario.Scenario()


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[LL]\nttft_s = 0.01", "class LL: TTFT of 0.01 s cannot be kept: an idle instance at full clock needs"),
        ("[slo]\ntbt_s = 0.02", "class SS: TBT of 0.02 s cannot be kept"),
        ("[engine]\nmodel = 'llama9'", "engine.model: there is no engine model 'llama9'"),
        ("[cluster]\ngpus_per_node = 16", "engine model llama2-70b_h100 holds TP 2, 4, 8, not TP 16 that SinglePool needs"),
    ],
)
def test_what_no_fleet_can_keep_is_refused_before_anything_runs(toml: str, said: str, hour: Trace) -> None:
    with pytest.raises((ConfigError, RequestError)) as caught:
        session.prepare(hour.between(0, 600), scenario.parse(toml))
    assert str(caught.value).startswith(said)
    assert caught.value.hint


def test_a_price_of_electricity_is_told_to_controllers_and_is_in_the_cost(hour: Trace) -> None:
    part = scale.scaled(hour.between(600, 780), 3.0, 1)
    text = "[prices]\nenergy_mean_usd_per_kwh = 0.2\nenergy_evening_rise = 0.5\nenergy_midday_dip = 0.4\n"
    free, priced = (session.prepare(part, scenario.parse(given)) for given in ("", text))
    evening = replace(part, begin_week_s=20 * 3600.0)
    dear = session.prepare(evening, scenario.parse(text))
    made = {}
    for name, comparison in (("free", free), ("priced", priced), ("dear", dear)):
        recorder, outcome = recorded("singlepool", comparison)
        told = {state.price_per_kwh for state, _ in recorder.seen}
        made[name] = report.of_policy(outcome, comparison.workload, comparison.setting, comparison.scenario.prices)
        assert (told == {None}) is (name == "free")
    assert made["free"]["cost_usd"] == pytest.approx(3.0 * made["free"]["gpu_hours"])
    bills = {name: entry["cost_usd"] - made["free"]["cost_usd"] for name, entry in made.items()}
    price = priced.setting.price
    assert price is not None
    assert price.over(np.arange(0.0, DAY_S, 60.0)).mean() == pytest.approx(0.2, rel=0.01)
    assert bills["priced"] == pytest.approx(price.at(90.0) * made["priced"]["energy_kwh"], rel=0.01)
    assert bills["dear"] > 1.1 * bills["priced"]
    del made["free"]["cost_usd"], made["priced"]["cost_usd"]
    assert made["free"] == made["priced"]  # a fixed fleet does the same whatever it costs


def test_carbon_has_its_mean_its_midday_and_its_evening() -> None:
    carbon = signals.carbon(scenario.PricesSection(), begin_week_s=DAY_S)
    day = carbon.over(np.arange(0.0, DAY_S, 60.0))
    assert day.mean() == pytest.approx(250, rel=0.01)
    assert carbon.at(12.5 * 3600) == pytest.approx(day.min())
    assert carbon.at(20 * 3600) == pytest.approx(day.max(), rel=0.01)


def test_events_are_told_rare_ones_first() -> None:
    from powerd_policies.dynamollm.fleet import FleetEvent

    many = [FleetEvent(float(n), "clock", "x") for n in range(5000)] + [FleetEvent(9e9, "infeasible", "LL")]
    told: list[dict[str, Any]] = report._told(tuple(many))
    assert len(told) == report.MOST_EVENTS
    assert told[-1]["kind"] == "infeasible"
