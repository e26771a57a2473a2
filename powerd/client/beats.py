"""Beats: one small message per instruction tells powerd-hw which clock of an armed plan comes next.

House rules: ``send`` never raises and never waits, and a beat that cannot go is dropped and counted: powerd-hw then falls back to
the safe clock by itself; a forked child does not beat; whatever happens to the plan is a fact to ask for.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from powerd.api import PlanView
from powerd.client.background import flight
from powerd.client.codec import decode, neutral
from powerd.errors import LeaseLostError, UnavailableError
from powerd.model import PlanState

if TYPE_CHECKING:
    from powerd.client.core import Client

SAFE_INDEX = 0xFFFFFFFF  # instead of an index: the safe clock
_BEAT = struct.Struct("<III")  # plan number, step, index
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_pack_into = _BEAT.pack_into


class Beats:
    """The beat socket of one armed plan; use ``send`` from one thread at a time. ``with`` closes it.

    ``dropped`` counts beats that did not go. ``on_clamped`` is called with the new ceiling in MHz (``None``: no longer cut) by
    the thread that follows the lease, ``on_ended`` with the reason when the plan is over.
    """

    def __init__(self, client: Client | None, view: PlanView, link: socket.socket | None, give_up: Callable[[], None]) -> None:
        self.dropped = 0
        self.on_clamped: Callable[[int | None], None] = lambda ceiling_mhz: None
        self.on_ended: Callable[[str], None] = lambda why: None
        self._client, self._view, self._give_up = client, view, give_up
        self._number, self._step = view.number, 0
        self._buffer = bytearray(_BEAT.size)
        self._flight = flight() if link is not None else None
        self._link = link
        self._put = None if link is None else link.send
        if link is not None:
            _live.add(self)

    def send(self, step: int, index: int) -> None:
        """Instruction ``index`` of this ``step`` comes next: its clock is set now. Never raises, never waits."""
        put = self._put
        if put is None:
            self.dropped += 1
            return
        try:
            _pack_into(self._buffer, 0, self._number, step, index)
            self._step = step
            if self._flight is None:
                put(self._buffer, _FLAGS)
                return
            self._flight(1)
            try:
                put(self._buffer, _FLAGS)
            except OSError:
                self._flight(-1)
                raise
        except BlockingIOError:
            self.dropped += 1
        except OSError as error:
            self.dropped += 1
            self._over(str(error))
        except Exception:
            self.dropped += 1  # not numbers of a beat

    def safe(self) -> None:
        """The safe clock until a later step begins: around an evaluation, a checkpoint, whatever is not in the plan."""
        self.send(self._step, SAFE_INDEX)

    def close(self) -> None:
        """Give the plan up: the lease's own setpoint holds again. Answers when the daemon knows; a second call does nothing."""
        link, self._link, self._put = self._link, None, None
        if link is None:
            return
        try:
            self._give_up()
        finally:
            link.close()

    def __enter__(self) -> Beats:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether beats can still have an effect, to the best of our knowledge."""
        return self._put is not None

    @property
    def clamped(self) -> int | None:
        """What the plan's clocks are cut to now in MHz; ``None`` when nothing cuts them: a reason to plan anew."""
        return self._view.ceiling_mhz

    @property
    def view(self) -> PlanView:
        """The plan as the daemon told of it last."""
        return self._view

    def _seen(self, view: PlanView) -> None:
        """The daemon tells how the plan stands."""
        before, self._view = self._view, view
        if view.state is PlanState.ENDED:
            self._over(view.why)
        elif view.ceiling_mhz != before.ceiling_mhz:
            self._call(lambda: self.on_clamped(view.ceiling_mhz))

    def _over(self, why: str) -> None:
        """The plan has ended, or nobody reads its socket any more."""
        link, self._link, self._put = self._link, None, None
        if link is None:
            return
        link.close()
        if self._client is not None and why not in ("replaced", "released"):
            self._client.warn(f"clock plan {self._view.id}", LeaseLostError(f"it has ended: {why}"))
        self._call(lambda: self.on_ended(why))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # somebody else's callback must not end the thread that follows the lease
            if self._client is not None:
                self._client.warn("callback of a clock plan", error)

    def _forget_in_child(self) -> None:
        link, self._link, self._put = self._link, None, None
        if link is not None:
            link.close()


class BeatDesk:
    """What the attach connection of one lease says of clock plans, kept until the one who asked takes it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._links: dict[int, socket.socket] = {}
        self._views: dict[int, PlanView] = {}
        self._beats: dict[int, Beats] = {}

    def take(self, content: dict[str, Any], descriptors: list[int]) -> bool:
        """One message; True when it was about a plan. Takes the descriptors that it understands out of the list."""
        if "beats" in content and len(descriptors) == 1:
            with self._changed:
                self._links[int(content["number"])] = socket.socket(fileno=descriptors.pop())
                self._changed.notify_all()
            return True
        if "plan" not in content:
            return False
        view = decode(PlanView, content["plan"])
        with self._changed:
            beats = self._beats.get(view.number)
            if beats is None:
                self._views[view.number] = view
            elif view.state is PlanState.ENDED:
                del self._beats[view.number]
        if beats is not None:
            beats._seen(view)
        return True

    def give(self, client: Client, view: PlanView, wait_s: float, give_up: Callable[[], None]) -> Beats:
        """The Beats of a plan that the daemon has armed; UnavailableError when its socket does not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: view.number in self._links, wait_s):
                raise UnavailableError("the beat socket did not come", hint="try again")
            beats = self._beats[view.number] = Beats(client, view, self._links.pop(view.number), give_up)
            newer = self._views.pop(view.number, None)
        if newer is not None:
            beats._seen(newer)
        return beats

    def forget(self, number: int) -> None:
        """Its holder gives this plan up."""
        with self._changed:
            self._beats.pop(number, None)

    def end(self, why: str) -> None:
        """The lease is over, and every plan with it."""
        with self._changed:
            gone, self._beats = list(self._beats.values()), {}
            for link in self._links.values():
                link.close()
            self._links.clear()
        for beats in gone:
            beats._over(why)


def inert(client: Client | None) -> Beats:
    """Beats that go nowhere: every method answers."""
    return Beats(client, neutral(PlanView), None, lambda: None)


_live: weakref.WeakSet[Beats] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for beats in list(_live):
        beats._forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
