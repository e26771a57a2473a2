"""The steady state agrees with a simulation of single iterations, and profiles made from it show what the paper teaches."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from powerd.errors import RequestError
from powerd.sim import enginemodels
from powerd_policies.dynamollm import steady
from powerd_policies.dynamollm.classes import Classes, Slo
from powerd_policies.dynamollm.profile import Profile
from powerd_policies.dynamollm.steady import Lengths, Work
from tests.unit import one_instance

MODEL = enginemodels.load()
CHUNK = 512
# (prompt from, to), (output from, to): evenly drawn.
SHAPES = {
    "SS": ((20, 255), (10, 99)),
    "SL": ((20, 255), (350, 700)),
    "MM": ((256, 1023), (100, 349)),
    "LS": ((1024, 4000), (10, 99)),
    "LL": ((1024, 8000), (350, 700)),
}
CLASSES = Classes()


def drawn(name: str) -> list[tuple[int, int]]:
    rng = random.Random(7)
    prompts, outputs = SHAPES[name]
    return [(rng.randint(*prompts), rng.randint(*outputs)) for _ in range(500)]


def lengths(name: str) -> Lengths:
    return Lengths.of(*zip(*drawn(name), strict=True))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return steady.profile_of(MODEL, {name: lengths(name) for name in SHAPES}, CLASSES, {2: 256, 4: 512, 8: 512})


def most(name: str, tp: int, clock_mhz: int) -> float:
    """Requests per second at which an instance is about to be overloaded."""
    low, high, own = 0.0, 200.0, lengths(name)
    for _ in range(30):
        middle = (low + high) / 2
        seen = steady.steady(MODEL.table[tp, clock_mhz], 10**9, {name: Work(middle, own)}, CHUNK)
        low, high = (middle, high) if seen.feasible else (low, middle)
    return low


@pytest.mark.parametrize("share", [0.03, 0.4, 0.75])
@pytest.mark.parametrize(("tp", "clock_mhz"), [(2, 1980), (4, 1530), (8, 1005)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_closed_form_is_what_a_simulation_of_iterations_does(name: str, tp: int, clock_mhz: int, share: float) -> None:
    rps = share * most(name, tp, clock_mhz)
    c = MODEL.table[tp, clock_mhz]
    told = steady.steady(c, 10**9, {name: Work(rps, lengths(name))}, CHUNK)
    seen = one_instance.run(c, rps, drawn(name), CHUNK, requests=600)
    assert told.ttft_p99_s is not None
    assert told.ttft_p50_s is not None
    assert told.tbt_p99_s is not None
    # 600 requests tell a mean to some percent and a tail to some tens of them.
    assert told.batch == pytest.approx(seen.batch, rel=0.13, abs=0.15)
    assert told.utilisation == pytest.approx(seen.busy, abs=0.09)
    assert told.power_w == pytest.approx(seen.power_w, rel=0.05)
    assert told.ttft_p50_s[name] == pytest.approx(seen.ttft_p50_s, rel=0.3)
    assert told.ttft_p99_s[name] == pytest.approx(seen.ttft_p99_s, rel=0.5)
    assert 0.8 * seen.own_tbt_p99_s <= told.tbt_p99_s <= 1.35 * seen.own_tbt_p99_s, "it comes in steps of one prompt"


def test_a_mix_of_classes_is_served_as_one_queue() -> None:
    c = MODEL.table[4, 1530]
    seen = one_instance.run(c, 1.2, drawn("SS") + drawn("LL"), CHUNK, requests=1500)
    told = steady.steady(c, 10**9, {name: Work(0.6, lengths(name)) for name in ("SS", "LL")}, CHUNK)
    assert told.ttft_p99_s is not None
    assert told.batch == pytest.approx(seen.batch, rel=0.12)
    assert told.power_w == pytest.approx(seen.power_w, rel=0.03)
    assert max(told.ttft_p99_s.values()) == pytest.approx(seen.ttft_p99_s, rel=0.5)
    assert told.ttft_p99_s["SS"] < told.ttft_p99_s["LL"], "a short prompt waits in the same queue but is computed sooner"


def test_nothing_to_do_is_idle_at_the_clock() -> None:
    c = MODEL.table[4, 1005]
    for mix in ({}, {"SS": Work(0.0, lengths("SS"))}):
        idle = steady.steady(c, 1000, mix)
        assert (idle.power_w, idle.utilisation, idle.feasible) == (c.idle_w, 0.0, True)


@pytest.mark.parametrize(
    ("mix", "kv_tokens", "max_running", "limit"),
    [
        ({"SS": Work(1000.0, Lengths.fixed(100, 50))}, 10**9, 256, "compute"),
        # Alone its prompts fit the time, but not beside decode in chunks: every chunk pays for an iteration.
        ({"LS": Work(2.7, Lengths.fixed(4000, 2))}, 10**9, 256, "chunk"),
        ({"SL": Work(2.0, Lengths.fixed(100, 700))}, 10**9, 32, "running"),
        ({"LL": Work(0.5, Lengths.fixed(4000, 500))}, 20_000, 256, "kv"),
        ({"SS": Work(0.01, Lengths.fixed(100, 50))}, 0, 256, "kv"),
    ],
)
def test_an_instance_that_cannot_keep_up_says_which_limit_it_hits(
    mix: dict[str, Work], kv_tokens: int, max_running: int, limit: str
) -> None:
    seen = steady.steady(MODEL.table[4, 1980], kv_tokens, mix, CHUNK, max_running)
    assert (seen.limit, seen.feasible) == (limit, False)
    assert not seen.meets({name: Slo(1e6, 1e6) for name in mix})


def test_more_load_is_never_quicker_and_never_draws_less() -> None:
    for name in SHAPES:
        top, own = most(name, 4, 1530), lengths(name)
        seen = [steady.steady(MODEL.table[4, 1530], 10**9, {name: Work(top * n / 40, own)}, CHUNK) for n in range(1, 40)]
        for low, high in itertools.pairwise(seen):
            assert low.ttft_p99_s is not None
            assert high.ttft_p99_s is not None
            assert high.power_w > low.power_w
            assert high.batch > low.batch
            assert high.ttft_p99_s[name] >= low.ttft_p99_s[name] * 0.97  # a rare prompt beside decode comes in steps
            assert (high.tbt_p99_s or math.inf) >= (low.tbt_p99_s or 0.0)


def test_every_clock_at_once_is_every_clock_alone() -> None:
    mix = {"SS": Work(2.0, lengths("SS")), "MM": Work(0.4, lengths("MM"))}
    assert steady.by_clock(MODEL, 4, mix, CHUNK, 64) == {
        clock: steady.steady(MODEL.table[4, clock], MODEL.kv_tokens[4], mix, CHUNK, 64) for clock in MODEL.clocks_mhz(4)
    }
    assert list(steady.by_clock(MODEL, 4, {})) == list(MODEL.clocks_mhz(4))


def best(profile: Profile, name: str, rps: float, tps: tuple[int, ...] = (2, 4, 8)) -> tuple[float, int, int]:
    """(joules per request, parallelism, clock) that serves a load of one class at the least energy, within its SLO."""
    found = []
    for tp in tps:
        for clock_mhz in profile.clocks_mhz(tp):
            if profile.capacity_rps(name, tp, clock_mhz) >= rps:
                found.append((profile.at(name, tp, clock_mhz, rps).energy_per_request_j, tp, clock_mhz))
    return min(found)


def test_short_requests_are_cheapest_at_low_parallelism_and_medium_clock(profile: Profile) -> None:
    _, tp, clock_mhz = best(profile, "SS", 1.0)
    assert tp == 2
    assert 1000 <= clock_mhz <= 1600


def test_long_requests_need_more_to_keep_their_slo(profile: Profile) -> None:
    short, long = best(profile, "SS", 0.3), best(profile, "LL", 0.3)
    assert (long[1], long[2]) > (short[1], short[2])
    assert profile.capacity_rps("LL", 2, 1980) < 0.1 < profile.capacity_rps("LL", 4, 1980)


@pytest.mark.parametrize("name", SHAPES)
def test_the_best_clock_moves_up_with_load_and_is_almost_never_the_highest(profile: Profile, name: str) -> None:
    top = profile.capacity_rps(name, 4, 1980)
    clocks = [best(profile, name, top * share, (4,))[2] for share in (0.1, 0.3, 0.5, 0.7, 0.85)]
    assert clocks == sorted(clocks)
    assert clocks[-1] > clocks[0]
    assert 1980 not in clocks


def test_infeasible_cells_are_marked_and_hold_no_load(profile: Profile) -> None:
    kept = [p for p in profile.points if p.feasible]
    assert all(p.ttft_p99_s <= CLASSES.slos[p.request_class].ttft_s for p in kept)
    assert all(p.tbt_p99_s <= CLASSES.slos[p.request_class].tbt_s for p in kept)
    assert all(p.source == "modelled" for p in profile.points)
    assert profile.capacity_rps("LS", 2, 810) == 0.0
    assert [p.feasible for p in profile.points if (p.request_class, p.tp, p.clock_mhz) == ("LS", 2, 810)] == [False]


def test_an_slo_that_nothing_keeps_is_said_by_class_with_what_would_be_needed() -> None:
    hard = Classes(slos={**CLASSES.slos, "LL": Slo(0.2, 0.1)})
    profile = steady.profile_of(MODEL, {"LL": lengths("LL"), "SS": lengths("SS")}, hard)
    assert list(profile.infeasible(hard.slos)) == ["LL"]
    with pytest.raises(RequestError, match=r"class LL cannot keep TTFT 0\.2 s .*the best is TP\d at \d+ MHz .* with TTFT \d"):
        profile.require({name: hard.slos[name] for name in profile.classes})


def test_lengths_of_a_trace_are_kept_by_class_and_bad_rows_are_named() -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    found = steady.lengths_of(head + "a,100,50\nb,200,70\nc,9000,10\nd,2000,400\n", CLASSES)
    assert found == {"SS": Lengths(150, 60, 200, 25_000, 3_700), "LL": Lengths.fixed(2000, 400)}
    with pytest.raises(RequestError, match="line 1 lacks the column 'GeneratedTokens'"):
        steady.lengths_of("TIMESTAMP,ContextTokens\na,1\n", CLASSES)
    with pytest.raises(RequestError, match="line 3: ContextTokens is 0"):
        steady.lengths_of(head + "a,100,50\nb,0,70\n", CLASSES)
    with pytest.raises(RequestError, match="no request within the context limit"):
        steady.lengths_of(head + "c,9000,10\n", CLASSES)


@pytest.mark.parametrize(("tp", "clock_mhz"), [(2, 1980), (2, 1005), (4, 1530), (8, 1980)])
def test_a_chunk_is_as_large_as_the_pace_allows(tp: int, clock_mhz: int) -> None:
    c = MODEL.table[tp, clock_mhz]
    chunk = steady.chunk_for(c, 0.1, 20)
    assert c.iteration_s(chunk, 20) <= 0.1 < c.iteration_s(chunk + 64, 20)
    assert steady.chunk_for(c, 10.0, 20) == 2048
    assert steady.chunk_for(c, 0.02, 20) == 0


@pytest.mark.parametrize(("name", "rps"), [("SS", 4.0), ("MM", 1.5), ("LL", 0.15)])
def test_the_clock_it_chooses_is_as_good_as_the_best_simulated_one(name: str, rps: float) -> None:
    clocks = MODEL.clocks_mhz(4)[::2]
    told = steady.by_clock(MODEL, 4, {name: Work(rps, lengths(name))}, CHUNK)
    seen = {clock: one_instance.run(MODEL.table[4, clock], rps, drawn(name), CHUNK, requests=500) for clock in clocks}
    slo = CLASSES.slos[name]

    def kept(clock: int, slack: float) -> bool:
        return seen[clock].ttft_p99_s <= slack * slo.ttft_s and seen[clock].own_tbt_p99_s <= slack * slo.tbt_s

    chosen = min((clock for clock in clocks if told[clock].meets(CLASSES.slos)), key=lambda clock: told[clock].power_w)
    best = min((clock for clock in clocks if kept(clock, 1.0)), key=lambda clock: seen[clock].power_w)
    assert kept(chosen, 1.1), "what it promises is kept, but for the noise of 500 requests"
    assert seen[chosen].power_w <= 1.05 * seen[best].power_w, "watts lost against the best choice"
