"""Continuous batching, as pure code: nobody is forgotten, nothing overflows, order is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powerd.sim.engine.batch import Batch, Request

SHAPES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=25)


def run(batch: Batch, requests: list[Request]) -> None:
    """One second per iteration until nothing is left."""
    for request in requests:
        batch.add(request)
    now_s = 0.0
    for _ in range(20_000):
        iteration = batch.next(now_s)
        if iteration is None:
            if not batch.waiting:
                return
            now_s = batch.waiting[0].arrived_s
            continue
        assert not iteration.chunks or iteration.prompt_tokens + len(iteration.decodes) <= batch.chunk_tokens
        assert all(tokens > 0 for _, tokens in iteration.chunks)
        assert all(r.arrived_s <= now_s for r in (*iteration.decodes, *(r for r, _ in iteration.chunks)))
        now_s += 1
        batch.finish(iteration, now_s)
        assert batch.kv_used <= batch.kv_tokens
        assert len(batch.running) <= batch.max_running
    raise AssertionError("it does not come to an end")


@given(shapes=SHAPES, kv_tokens=st.integers(100, 300), chunk=st.integers(1, 64), most=st.integers(1, 8))
def test_every_request_gets_exactly_its_tokens(shapes: list[tuple[int, int, int]], kv_tokens: int, chunk: int, most: int) -> None:
    shapes = sorted(shapes, key=lambda row: row[2])
    requests = [Request(n, prompt, output, arrived) for n, (prompt, output, arrived) in enumerate(shapes)]
    batch = Batch(kv_tokens, chunk, most)
    run(batch, requests)
    assert not batch.running
    assert [request.generated for request in requests] == [output for _, output, _ in shapes]
    for request in requests:
        assert request.first_s is not None
        assert request.last_s is not None
        assert request.first_s >= request.arrived_s + -(-request.prompt_tokens // chunk), "a chunk per iteration at most"
        assert request.last_s >= request.first_s + request.output_tokens - 1, "a token per iteration at most"
    first = [request.scheduled_s for request in requests if request.scheduled_s is not None]
    assert len(first) == len(requests)
    assert first == sorted(first), "first come, first served"


def test_a_full_cache_preempts_the_youngest_who_still_gets_everything() -> None:
    batch = Batch(kv_tokens=40, chunk_tokens=64)
    old, young = Request(0, 15, 20, 0.0), Request(1, 15, 20, 0.0)
    run(batch, [old, young])
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert (old.generated, young.generated) == (20, 20)
    assert batch.preemptions == 1


def test_who_goes_leaves_the_cache() -> None:
    batch = Batch(kv_tokens=100, chunk_tokens=64)
    stays, goes = Request(0, 10, 5, 0.0), Request(1, 10, 5, 0.0)
    batch.add(stays)
    batch.add(goes)
    iteration = batch.next(0.0)
    assert iteration is not None
    batch.finish(iteration, 1.0)
    batch.remove(goes)
    assert (batch.kv_used, batch.running) == (10, [stays])


def test_by_priority_the_lowest_goes_first_and_the_last_is_preempted() -> None:
    batch = Batch(kv_tokens=45, chunk_tokens=64, max_running=2, by_priority=True)
    late, soon, now = (
        Request(0, 15, 20, 0.0, priority=30),
        Request(1, 15, 5, 0.0, priority=20),
        Request(2, 15, 20, 1.0, priority=10),
    )
    run(batch, [late, soon, now])
    assert now.first_s is not None
    assert late.first_s is not None
    assert (soon.scheduled_s, late.scheduled_s) == (0.0, 0.0), "who has not come yet does not keep others back"
    assert late.preemptions + now.preemptions == late.preemptions > 0, "whose priority is last gives way"
    assert [r.generated for r in (late, soon, now)] == [20, 5, 20]
    first = [r.first_s or 0.0 for r in (*_served(False), *_served(True))]
    assert first[0] < first[1], "first come, first served"
    assert first[2] > first[3], "by priority"


def _served(by_priority: bool) -> list[Request]:
    batch = Batch(kv_tokens=100, chunk_tokens=10, by_priority=by_priority)
    requests = [Request(0, 40, 2, 0.0, priority=2), Request(1, 40, 2, 0.0, priority=1)]
    run(batch, requests)
    return requests
