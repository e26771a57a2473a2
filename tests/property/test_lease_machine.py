"""The lease state machine: in whatever order things happen, an ended lease stays ended and an illegal event changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.api import WantSpec
from powerd.errors import LeaseLostError, PowerdError
from powerd.lease import ENDINGS, TRANSITIONS, Lease, LeaseEvent, advance, new_token, token_matches
from powerd.model import Control, LeaseState

GPUS = ("GPU-a", "GPU-b")
events = st.tuples(st.sampled_from(list(LeaseEvent)), st.sampled_from(GPUS), st.integers(0, 10**9))


def fresh() -> Lease:
    _, hashed = new_token()
    return Lease(
        id="l1", token_hash=hashed, uid=7, user="u", pid=1, gpus=GPUS, wants=(WantSpec(Control.SM_CLOCK, high=1200),), reason="r",
        ttl_ns=10**9, created_ns=0, expires_ns=10**9, attach_by_ns=5 * 10**8,
    )  # fmt: skip


@given(st.lists(events, max_size=30))
def test_no_sequence_of_events_leaves_the_table(steps: list[tuple[LeaseEvent, str, int]]) -> None:
    lease, now = fresh(), 0
    for event, gpu, delta in steps:
        now += delta
        legal = lease.live and ((event in ENDINGS and lease.state in ENDINGS[event][0]) or (lease.state, event) in TRANSITIONS)
        try:
            after = advance(lease, event, now, gpu=gpu, attach_by_ns=now + 5)
        except PowerdError:
            assert not legal
            continue
        assert legal
        assert (after.end is not None) == (after.state is LeaseState.ENDED) == (event in ENDINGS)
        if after.live:
            assert set(after.lost) <= set(GPUS)
            assert (after.state is LeaseState.SUSPENDED) <= bool(after.lost)
            assert not (after.state is LeaseState.ACTIVE and after.lost)
        assert (after.id, after.token_hash, after.uid, after.created_ns) == (
            lease.id,
            lease.token_hash,
            lease.uid,
            lease.created_ns,
        )
        lease = after


@given(st.sampled_from(list(LeaseEvent)))
def test_an_ended_lease_refuses_everything(event: LeaseEvent) -> None:
    ended = advance(fresh(), LeaseEvent.RELEASE, 3)
    with pytest.raises(LeaseLostError):
        advance(ended, event, 4, gpu="GPU-a")


def test_time_alone_ends_a_lease_once_its_ttl_or_its_attach_window_is_over() -> None:
    lease = fresh()
    assert lease.due(4 * 10**8) is None
    assert lease.due(5 * 10**8) is LeaseEvent.REATTACH_ENDED
    attached = advance(lease, LeaseEvent.ATTACH, 1)
    assert attached.due(5 * 10**8) is None
    assert attached.due(10**9) is LeaseEvent.EXPIRE
    beaten = advance(attached, LeaseEvent.HEARTBEAT, 9 * 10**8)
    assert beaten.due(10**9) is None
    assert beaten.next_due_ns() == 19 * 10**8


def test_a_lost_connection_ends_a_live_lease_but_not_one_that_waits_after_a_restart() -> None:
    attached = advance(fresh(), LeaseEvent.ATTACH, 1)
    assert advance(attached, LeaseEvent.CONNECTION_CLOSED, 2).state is LeaseState.ENDED
    adopted = advance(attached, LeaseEvent.ADOPT, 2, attach_by_ns=10)
    with pytest.raises(PowerdError):
        advance(adopted, LeaseEvent.CONNECTION_CLOSED, 3)
    assert advance(adopted, LeaseEvent.ATTACH, 3).state is LeaseState.ACTIVE
    assert adopted.due(10) is LeaseEvent.REATTACH_ENDED


def test_a_lease_is_suspended_until_the_last_lost_gpu_is_back() -> None:
    lease = advance(fresh(), LeaseEvent.ATTACH, 1)
    one = advance(lease, LeaseEvent.GPU_LOST, 2, gpu="GPU-a")
    both = advance(one, LeaseEvent.GPU_LOST, 3, gpu="GPU-b")
    back = advance(both, LeaseEvent.GPU_BACK, 4, gpu="GPU-a")
    assert (one.state, both.state, back.state) == (LeaseState.SUSPENDED,) * 3
    assert advance(back, LeaseEvent.GPU_BACK, 5, gpu="GPU-b").state is LeaseState.ACTIVE


def test_only_the_token_matches_and_it_is_not_kept() -> None:
    token, hashed = new_token()
    lease = fresh()
    assert not token_matches(lease, token)
    assert not token_matches(lease, None)
    other = Lease(**{f: getattr(lease, f) for f in Lease.__slots__} | {"token_hash": hashed})
    assert token_matches(other, token)
    assert token not in repr(other)
