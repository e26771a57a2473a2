"""Where requests go."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd_policies.dynamollm.classes import NAMES, Classes
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceState, InstanceWant
from powerd_policies.dynamollm.router import PromptTooLongError, Router
from tests.policies.dynamollm.engines import CLOCKS_MHZ, engine

MODEL = engine()


def states(*named: tuple[str, str], tp: int = 8, clock_mhz: int = 1980) -> tuple[InstanceState, ...]:
    return tuple(InstanceState(name, pool, tp, clock_mhz) for name, pool in named)


def plan(instances: tuple[InstanceState, ...], routes: dict[str, tuple[str, ...]]) -> FleetPlan:
    return FleetPlan(tuple(InstanceWant(each.id, each.pool, each.tp, each.clock_mhz) for each in instances), routes)


def router(instances: tuple[InstanceState, ...], routes: dict[str, tuple[str, ...]] | None = None) -> Router:
    made = Router(MODEL)
    made.update(plan(instances, routes or dict.fromkeys(NAMES, ("one", "two"))), instances)
    return made


def test_the_instance_with_the_fewest_outstanding_tokens_takes_the_request() -> None:
    each = router(states(("a", "one"), ("b", "one")))
    assert [each.route(400, 1), each.route(300, 1), each.route(50, 1), each.route(10, 1)] == ["a", "b", "b", "b"]


def test_first_tokens_and_ends_are_taken_off_again() -> None:
    each = router(states(("a", "one"), ("b", "one")))
    assert each.route(400, 1) == "a"
    each.first_token("a", 400)
    assert each.route(10, 1) == "b", "a still decodes one"
    each.abandoned("b", 10)
    each.finished("a")
    each.abandoned("unknown", 10)
    assert each.outstanding() == {"a": (0, 0), "b": (0, 0)}
    assert each.route(10, 1) == "a"


def test_a_full_pool_spills_to_the_next_of_the_route_and_a_full_route_to_the_soonest() -> None:
    slow, fast = states(("a", "one"), tp=4)[0], states(("b", "two"))[0]
    each = Router(MODEL, chunk_tokens=100_000)
    each.update(plan((slow, fast), dict.fromkeys(NAMES, ("one", "two"))), (slow, fast))
    of = {"a": MODEL.table[4, 1980], "b": MODEL.table[8, 1980]}
    fits = {name: int((0.25 - at.prefill_fixed_s) / at.prefill_token_s / 200) for name, at in of.items()}
    taken = [each.route(200, 0) for _ in range(sum(fits.values()))]
    assert taken == ["a"] * fits["a"] + ["b"] * fits["b"], "within the SLO, pool by pool"
    assert each.route(250, 0) == "b", "neither meets it: b has more to do and is done sooner"


def test_who_is_avoided_takes_a_request_only_where_nobody_else_can() -> None:
    each = router(states(("a", "one"), ("b", "two")))
    assert each.route(100, 1, avoid={"a"}) == "b", "another pool of the route"
    assert each.route(100, 1, avoid={"a", "b"}) in ("a", "b"), "a request is never lost"
    assert each.has_other(100, 1, {"a"})
    assert not each.has_other(100, 1, {"a", "b"})
    assert not router(states(("a", "one"), ("b", "two")), dict.fromkeys(NAMES, ("one",))).has_other(100, 1, {"a"})


def test_an_instance_that_decodes_much_is_slower_with_prompts() -> None:
    each = router(states(("a", "one"), ("b", "two")))
    for _ in range(50):
        each.first_token("a", 0)
    assert each.route(900, 0) == "a", "400 ms are enough for a medium prompt"
    each.first_token("a", 900)
    for _ in range(200):
        each.first_token("a", 0)
    assert each.route(900, 0) == "b", "250 requests leave small chunks and make long iterations"


def test_a_class_with_more_patience_stays_in_its_pool() -> None:
    each = router(states(("a", "one"), ("b", "two")))
    for _ in range(12):
        each.route(200, 0)
    assert each.route(200, 0) == "b"
    assert each.route(2000, 0) == "a", "a long prompt may wait two seconds"


def test_who_starts_drains_or_only_decodes_takes_nothing() -> None:
    a, b, c, d = states(("a", "one"), ("b", "one"), ("c", "one"), ("d", "two"))
    each = router((replace(a, phase="starting"), replace(b, phase="draining"), replace(c, role="decode"), d))
    assert each.route(100, 0) == "d"
    assert router((replace(a, phase="starting"),)).route(100, 0) is None
    assert router((), {}).route(100, 0) is None


def test_an_update_keeps_the_counts_of_those_that_stay() -> None:
    both = states(("a", "one"), ("b", "one"))
    each = router(both)
    assert each.route(400, 1) == "a"
    each.update(plan(both, dict.fromkeys(NAMES, ("one",))), both)
    assert each.outstanding()["a"] == (400, 1)
    each.update(plan(both[1:], dict.fromkeys(NAMES, ("one",))), both[1:])
    each.first_token("a", 400)
    assert each.outstanding() == {"b": (0, 0)}


def test_a_table_without_figures_is_refused_and_the_old_one_stays() -> None:
    each = router(states(("a", "one")))
    strange = states(("z", "one"), tp=16)
    with pytest.raises(LookupError, match="TP16"):
        each.update(plan(strange, dict.fromkeys(NAMES, ("one",))), strange)
    assert each.route(100, 0) == "a"


def test_a_prompt_beyond_the_limit_has_no_class() -> None:
    with pytest.raises(PromptTooLongError, match=r"8193.*8192"):
        router(states(("a", "one"))).route(8193, 0)


def test_a_request_that_outgrows_its_class_is_told_once_it_does() -> None:
    each = router(states(("a", "one")))
    assert each.outgrown("a", 0, 99, 1.0) is None
    event = each.outgrown("a", 0, 100, 1.0)
    assert event is not None
    assert (event.kind, event.subject) == ("misprediction", "a")
    assert each.outgrown("a", 2, 5000, 1.0) is None


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 2), st.booleans()), min_size=1, max_size=60),
    kinds=st.lists(
        st.tuples(st.sampled_from(["one", "two", "three"]), st.sampled_from(MODEL.tps), st.sampled_from(CLOCKS_MHZ)),
        min_size=1,
        max_size=8,
    ),
)
def test_the_choice_is_the_rule_read_aloud(requests: list[tuple[int, int, bool]], kinds: list[tuple[str, int, int]]) -> None:
    """Against a plain reading: pools in order, those in time, fewest tokens, emptiest, first; else the soonest."""
    instances = tuple(InstanceState(str(n), pool, tp, clock) for n, (pool, tp, clock) in enumerate(kinds))
    route = ("one", "two", "three")
    each = router(instances, dict.fromkeys(NAMES, route))
    tokens, running, decoding, classes = Counter[str](), Counter[str](), Counter[str](), Classes()
    for prompt, output, answered in requests:
        name = NAMES[3 * (classes.size_of_prompt(prompt) or 0) + output]
        ttft_s = classes.slos[name].ttft_s

        def wait_s(i: InstanceState, prompt: int = prompt) -> float:
            at = MODEL.table[i.tp, i.clock_mhz]
            waiting, b = tokens[i.id] + prompt, decoding[i.id]
            fixed_s = max(at.prefill_fixed_s, at.decode_fixed_s) if b else at.prefill_fixed_s
            return math.ceil(waiting / (512 - b)) * (fixed_s + at.decode_request_s * b) + at.prefill_token_s * waiting

        in_order = [i for pool in route for i in instances if i.pool == pool]
        in_time = [[i for i in in_order if i.pool == pool and wait_s(i) <= ttft_s] for pool in route]
        among = next((some for some in in_time if some), None)
        if among is None:
            expected = min(in_order, key=wait_s)
        else:
            expected = min(among, key=lambda i: (tokens[i.id], Fraction(running[i.id], MODEL.kv_tokens[i.tp])))
        assert each.route(prompt, output) == expected.id
        running[expected.id] += 1
        if answered:
            each.first_token(expected.id, prompt)
            decoding[expected.id] += 1
        else:
            tokens[expected.id] += prompt


def test_two_threads_lose_no_count_while_a_third_updates() -> None:
    both = states(("a", "one"), ("b", "one"))
    each = Router(MODEL, lock=threading.Lock())
    wanted = plan(both, dict.fromkeys(NAMES, ("one",)))

    each.update(wanted, both)

    def send() -> None:
        for _ in range(3000):
            each.route(10, 0)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        each.update(wanted, both)
    for thread in threads:
        thread.join()
    assert sum(tokens for tokens, _ in each.outstanding().values()) == 60_000
