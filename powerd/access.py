"""Who may do what: pure decisions from a principal and facts, made anew for every request.

House rules: a decision is an object with its reason, never a reply; identity comes from the kernel (peer credentials, pidfd) or a
bearer token, never from what the client says; what is not permitted here is denied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class View(StrEnum):
    """How much of a GPU a caller may read."""

    FULL = "full"  # full rate, full resolution, energy windows
    SLOW = "slow"  # at most 1 Hz; whole watts, joules and seconds
    NONE = "none"


class Origin(StrEnum):
    """Where a request came from."""

    UNIX = "unix"
    TCP = "tcp"
    TCP_TOKEN = "tcp_token"  # noqa: S105 (a kind, not a secret)
    TCP_READER = "tcp_reader"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling. ``pid`` is ``None`` in a foreign PID namespace or when the process that connected has died."""

    origin: Origin
    uid: int | None = None
    user: str = ""
    groups: frozenset[int] = frozenset()
    pid: int | None = None
    foreign: bool = False  # the kernel cannot name the process in our namespace


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator decided; ``group`` is the numeric id of ``access.group`` when it exists."""

    daemon_uid: int
    group: int | None = None
    open_reads: bool = False
    loopback_reads: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Who runs where, as NVML and the leases say."""

    processes: Mapping[str, frozenset[int]] = field(default_factory=dict)  # GPU -> host PIDs on it
    users: Mapping[str, frozenset[int]] = field(default_factory=dict)  # GPU -> uids of these processes
    leased: Mapping[str, frozenset[int]] = field(default_factory=dict)  # GPU -> uids that hold a live lease on it
    shown: frozenset[str] = frozenset()  # GPUs of the lease whose token came with the request


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether, and in one line why."""

    allowed: bool
    why: str


def may_control(who: Principal, rules: Rules) -> Decision:
    """Whether this caller may set every GPU of the node, and read everything."""
    if who.origin is Origin.TCP_TOKEN:
        return Decision(True, "bearer token")
    if who.origin is Origin.TCP:
        return Decision(False, "TCP without the bearer token")
    if who.origin is Origin.TCP_READER:
        return Decision(False, "the read token only reads")
    if who.foreign:
        return Decision(False, "callers in a foreign PID namespace only read")
    if who.uid in (0, rules.daemon_uid):
        return Decision(True, "root or the daemon's own user")
    if rules.group is not None and rules.group in who.groups:
        return Decision(True, "member of the control group")
    return Decision(False, f"user {who.user or who.uid} is neither root nor in the control group")


def may_read_all(who: Principal, rules: Rules) -> Decision:
    """Whether this caller may read every GPU at full rate, with history and metrics of everybody."""
    control = may_control(who, rules)
    if control.allowed:
        return control
    if who.origin is Origin.TCP:
        return Decision(rules.loopback_reads, "tcp.loopback_reads")
    if who.origin is Origin.TCP_READER:
        return Decision(True, "read token")
    if rules.open_reads:
        return Decision(True, "access.open_reads")
    if who.foreign and who.uid in (0, rules.daemon_uid):
        return Decision(True, "root or the daemon's own user, reading")
    return Decision(False, control.why)


def view_of(uuid: str, who: Principal, rules: Rules, facts: Facts) -> View:
    """How much of one GPU this caller may read."""
    if may_read_all(who, rules).allowed or uuid in facts.shown:
        return View.FULL
    if who.origin is not Origin.UNIX or who.uid is None:
        return View.NONE
    if who.uid in facts.leased.get(uuid, ()):
        return View.FULL
    if who.pid is not None and not who.foreign and who.pid in facts.processes.get(uuid, ()):
        return View.FULL
    return View.SLOW if who.uid in facts.users.get(uuid, ()) else View.NONE
