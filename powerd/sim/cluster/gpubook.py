"""Which GPUs of the fleet are used: instances wait here until there are enough, warm ones before cold ones.

House rules: pure, no clock; GPUs that a plan takes from instances and gives to new ones in the same plan still hold the weights:
they are kept for those, and starting on them costs a re-shard, not a start; whoever asked first is served first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from powerd_policies.dynamollm.fleet import Role


@dataclass(slots=True)
class Member:
    """One instance of the fleet, with or without GPUs."""

    id: str
    serial: int
    pool: str
    tp: int
    clock_mhz: int
    role: Role = "both"
    slot: int | None = None  # in the core; None: waits for GPUs
    ready_s: float | None = None  # when it began to start: when it serves
    draining: bool = False
    group: int | None = None  # the plan that took its GPUs or gave it those of others


@dataclass(slots=True)
class Warm:
    """GPUs that one plan keeps for its new instances."""

    gpus: int
    since_ns: int
    idle_w: float


@dataclass(slots=True)
class GpuBook:
    """Counts ``total`` GPUs. ``hold`` is told of warm GPUs that drew power while they waited."""

    total: int
    hold: Callable[[int, int, int, float], None]  # gpus, from and until in ns, watts of one
    used: int = 0
    warm: dict[int, Warm] = field(default_factory=dict)
    waiting: list[Member] = field(default_factory=list)

    @property
    def free(self) -> int:
        """GPUs that nobody has and nobody keeps."""
        return self.total - self.used - sum(kept.gpus for kept in self.warm.values())

    def give_back(self, member: Member, now_ns: int, idle_w: float) -> None:
        """An instance ended: its GPUs are kept for those of its plan that wait for them, or free."""
        self.used -= member.tp
        if member.group is None or not any(other.group == member.group for other in self.waiting):
            return
        self._settle(member.group, now_ns)
        kept = self.warm.setdefault(member.group, Warm(0, now_ns, idle_w))
        kept.gpus, kept.idle_w = kept.gpus + member.tp, idle_w

    def startable(self, now_ns: int, donors: Callable[[int], bool]) -> list[tuple[Member, bool]]:
        """Take GPUs for whoever can begin now; with each, whether its GPUs are warm. ``donors``: whether a plan's still drain."""
        found: list[tuple[Member, bool]] = []
        blocked = False
        for member in list(self.waiting):
            group = member.group
            kept = self.warm.get(group) if group is not None else None
            if group is not None and kept is not None and kept.gpus >= member.tp:
                self._settle(group, now_ns)
                kept.gpus -= member.tp
                self._take(member, found, warm=True)
            elif group is not None and donors(group):
                pass  # those that it waits for still drain
            else:
                if group is not None:
                    member.group = None
                    self._drop_unwanted(now_ns)
                blocked = blocked or self.free < member.tp
                if not blocked:
                    self._take(member, found, warm=False)
        self._drop_unwanted(now_ns)
        return found

    def forget(self, member: Member, now_ns: int) -> None:
        """An instance that waits for GPUs is not wanted any more."""
        self.waiting.remove(member)
        self._drop_unwanted(now_ns)

    def settle_all(self, now_ns: int) -> None:
        """Tell ``hold`` of everything up to now."""
        for group in self.warm:
            self._settle(group, now_ns)

    def _take(self, member: Member, found: list[tuple[Member, bool]], *, warm: bool) -> None:
        self.waiting.remove(member)
        self.used += member.tp
        found.append((member, warm))

    def _settle(self, group: int, now_ns: int) -> None:
        kept = self.warm.get(group)
        if kept is not None and kept.gpus:
            self.hold(kept.gpus, kept.since_ns, now_ns, kept.idle_w)
        if kept is not None:
            kept.since_ns = now_ns

    def _drop_unwanted(self, now_ns: int) -> None:
        wanted = {member.group for member in self.waiting}
        for group in [group for group in self.warm if group not in wanted]:
            self._settle(group, now_ns)
            del self.warm[group]
