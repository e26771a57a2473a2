"""Who may do what, as a table: nobody gets more than a row says."""

from __future__ import annotations

import pytest

from powerd.access import Facts, Origin, Principal, Rules, View, may_control, may_read_all, view_of

GPU, OTHER = "GPU-a", "GPU-b"
RULES = Rules(daemon_uid=990, group=27)
FACTS = Facts(
    processes={GPU: frozenset({4711})},
    users={GPU: frozenset({1000, 1001})},
    leased={OTHER: frozenset({1002})},
)


def unix(uid: int, pid: int | None = 1, groups: tuple[int, ...] = (), foreign: bool = False) -> Principal:
    return Principal(Origin.UNIX, uid, "u", frozenset(groups), pid, foreign)


@pytest.mark.parametrize(
    ("who", "control", "read_all", "gpu", "other"),
    [
        (unix(0), True, True, View.FULL, View.FULL),
        (unix(990), True, True, View.FULL, View.FULL),
        (unix(1005, groups=(27,)), True, True, View.FULL, View.FULL),
        (unix(1005, groups=(28,)), False, False, View.NONE, View.NONE),
        (unix(1000, pid=4711), False, False, View.FULL, View.NONE),
        (unix(1000, pid=4712), False, False, View.SLOW, View.NONE),
        (unix(1005, pid=4711), False, False, View.FULL, View.NONE),
        (unix(1000, pid=None), False, False, View.SLOW, View.NONE),
        (unix(1002), False, False, View.NONE, View.FULL),
        (unix(0, pid=None, foreign=True), False, True, View.FULL, View.FULL),
        (unix(1005, pid=None, groups=(27,), foreign=True), False, False, View.NONE, View.NONE),
        (unix(1000, pid=4711, foreign=True), False, False, View.SLOW, View.NONE),
        (Principal(Origin.TCP), False, False, View.NONE, View.NONE),
        (Principal(Origin.TCP, uid=0), False, False, View.NONE, View.NONE),
        (Principal(Origin.TCP_TOKEN), True, True, View.FULL, View.FULL),
        (Principal(Origin.TCP_READER), False, True, View.FULL, View.FULL),
    ],
)
def test_every_kind_of_caller(who: Principal, control: bool, read_all: bool, gpu: View, other: View) -> None:
    assert may_control(who, RULES).allowed is control
    assert may_read_all(who, RULES).allowed is read_all
    assert view_of(GPU, who, RULES, FACTS) is gpu
    assert view_of(OTHER, who, RULES, FACTS) is other


def test_open_reads_and_loopback_reads_open_reads_only() -> None:
    open_rules = Rules(daemon_uid=990, open_reads=True, loopback_reads=True)
    for who in (unix(1005), Principal(Origin.TCP)):
        assert may_read_all(who, open_rules).allowed
        assert not may_control(who, open_rules).allowed
    assert not may_read_all(Principal(Origin.TCP), Rules(990, open_reads=True)).allowed


def test_a_shown_lease_token_opens_its_gpus_only() -> None:
    facts = Facts(shown=frozenset({GPU}))
    assert view_of(GPU, unix(1005), RULES, facts) is View.FULL
    assert view_of(OTHER, unix(1005), RULES, facts) is View.NONE


def test_without_the_group_nobody_is_in_it() -> None:
    assert not may_control(unix(1005, groups=(0, 27)), Rules(daemon_uid=990, group=None)).allowed
