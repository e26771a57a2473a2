"""A lease as its holder sees it: acquired, kept alive, attached to this process, released.

House rules: the kernel, not this code, tells the daemon that the holder died (an open SOCK_SEQPACKET connection and a pidfd);
background threads never raise and never outlive the process; losing a lease is a fact the holder can ask for, not an exception
in the middle of its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from powerd.api import API_VERSION, Ack, LeaseRequest, LeaseView, PlanView, RefusalView, WantSpec
from powerd.client import beats as _beats
from powerd.client.background import nothing, pacer, start
from powerd.client.beats import BeatDesk, Beats
from powerd.client.codec import CodecError, decode, neutral
from powerd.client.transport import check_server, error_of
from powerd.errors import LeaseLostError, PowerdError, RequestError, UnavailableError
from powerd.model import ClockPlan, Control, LeaseState, Outcome, Verdict

if TYPE_CHECKING:
    from powerd.client.core import Client

#: One number, or (low, high) with ``None`` for an open end, or nothing wanted.
Bounds = float | tuple[float | None, float | None] | None
REATTACH_S = 60.0  # how long a holder tries to come back after a daemon restart
_MESSAGE_BYTES = 1 << 18  # a lease on many GPUs tells of many outcomes


def want_specs(sm_clock_mhz: Bounds, power_limit_w: Bounds, memory_clock_mhz: Bounds) -> tuple[WantSpec, ...]:
    """Wants in NVML's units; RequestError when nothing is wanted or a bound is upside down."""
    wants = []
    for control, bounds, factor in (
        (Control.SM_CLOCK, sm_clock_mhz, 1), (Control.POWER_LIMIT, power_limit_w, 1000),
        (Control.MEMORY_CLOCK, memory_clock_mhz, 1),
    ):  # fmt: skip
        if bounds is None:
            continue
        if isinstance(bounds, tuple):
            low, high = bounds
        else:
            low, high = (None if control is Control.POWER_LIMIT else bounds), bounds  # a limit is a ceiling, a clock is pinned
        if low is None and high is None:
            raise RequestError(f"{control}: both bounds are open", hint="give at least one")
        if (low is not None and low <= 0) or (high is not None and high <= 0) or (low or 0) > (high or float("inf")):
            raise RequestError(f"{control}: {low}..{high} is not a range above zero", code="bad_value")
        wants.append(
            WantSpec(control, None if low is None else round(low * factor), None if high is None else round(high * factor))
        )
    if not wants:
        raise RequestError("a lease wants something", hint="give sm_clock_mhz, power_limit_w or memory_clock_mhz")
    return tuple(wants)


class Lease:
    """A live lease; ``with`` releases it. ``held`` turns False when it is lost, and ``lost_reason`` says why."""

    def __init__(self, client: Client, view: LeaseView, *, held: bool, keep_alive: bool) -> None:
        self._client = client
        self._view = view
        self._token = view.token
        self._held = held
        self._keep_alive = keep_alive
        self._released = False
        self._socket: socket.socket | None = None
        self._stop = threading.Event()
        self._wake_heart = self._stop.set
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._desk = BeatDesk()
        self.lost_reason = ""

    @classmethod
    def acquire(cls, client: Client, request: LeaseRequest, *, keep_alive: bool) -> Lease:
        """Ask the daemon, bind the lease to this process and start its heart; raises what the daemon answers."""
        strict = client.lease_create(request)
        if not strict.id and not request.dry_run:  # a logging client's neutral answer: it has warned already
            return cls.inert(client)
        if request.dry_run:
            return cls(client, strict, held=False, keep_alive=keep_alive)
        return cls.keep(client, strict, keep_alive=keep_alive)

    @classmethod
    def keep(cls, client: Client, granted: LeaseView, *, keep_alive: bool) -> Lease:
        """Bind a lease that was just granted to this process, unless it is detached, and start its heart."""
        lease = cls(client, granted, held=True, keep_alive=keep_alive)
        if not granted.detached:
            try:
                lease._socket = lease._attach()
            except Exception:
                with contextlib.suppress(Exception):
                    client.lease_release(granted.id, granted.token)
                raise
            client.killpoint("client.attached")
            _attached.add(lease)
            start(lease._watch, "powerd-lease-attach")
        if keep_alive:
            start(lease._beat, "powerd-lease-heartbeat")
        return lease

    @classmethod
    def inert(cls, client: Client) -> Lease:
        """A lease that was never granted: every method answers, nothing is set."""
        lease = cls(client, neutral(LeaseView), held=False, keep_alive=False)
        lease.lost_reason = "never granted"
        return lease

    # -- what is known ---------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The lease's id; empty when it was never granted."""
        return self._view.id

    @property
    def view(self) -> LeaseView:
        """The lease as last seen (the token is kept apart)."""
        return self._view

    @property
    def token(self) -> str | None:
        """The secret that re-attaches, changes and releases it."""
        return self._token

    @property
    def held(self) -> bool:
        """Whether the lease is, to the best of our knowledge, in force."""
        return self._held

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each (GPU, control) at the last answer."""
        return self._view.outcomes

    @property
    def refused(self) -> tuple[RefusalView, ...]:
        """Wants that are not served, with the reason."""
        return self._view.refused

    @property
    def overridden(self) -> bool:
        """Whether the driver took a setting that then had no effect."""
        return any(o.verdict in (Verdict.OVERRIDDEN, Verdict.FAILED) for o in self._view.outcomes)

    # -- what can be done ------------------------------------------------------------------------------------------------

    def change(
        self, *, sm_clock_mhz: Bounds = None, power_limit_w: Bounds = None, memory_clock_mhz: Bounds = None, wait_s: float = 2.0
    ) -> tuple[Outcome, ...]:
        """Replace all wants of this lease and wait up to ``wait_s`` for the outcomes; LeaseLostError when it is gone."""

        def change() -> tuple[Outcome, ...]:
            wants = want_specs(sm_clock_mhz, power_limit_w, memory_clock_mhz)
            if not self._held:
                raise LeaseLostError(
                    f"lease {self.id or 'never granted'}: {self.lost_reason or 'released'}", hint="acquire it again"
                )
            view = self._client.lease_change(self.id, wants, self._token, wait_s)
            if view.id:
                self._view = view
            return view.outcomes

        return self._client.guard("lease change", change, tuple)

    def arm(self, plan: ClockPlan, *, wait_s: float = 2.0) -> Beats:
        """Have powerd-hw follow a clock plan on one GPU of this lease, driven by the beats of what is returned.

        The lease has to want a bound on the SM clock, which cuts the plan: its highest clock, usually. A plan that is armed on
        this GPU already goes on until the first beat of this one. ``wait_s``: how long the beat socket may take.
        RequestError names the instruction whose clock cannot be; LeaseLostError when the lease is gone.
        """

        def arm() -> Beats:
            if not self._held:
                raise LeaseLostError(
                    f"lease {self.id or 'never granted'}: {self.lost_reason or 'released'}", hint="acquire again"
                )
            view = self._client.plan_arm(self.id, plan, self._token)
            if not view.id:
                return _beats.inert(self._client)

            def give_up() -> None:
                self._desk.forget(view.number)
                if self._held:
                    self._client.guard("plan", lambda: self._client.plan_disarm(self.id, view.number, self._token), Ack)

            beats = self._desk.give(self._client, view, wait_s, give_up)
            self._client.killpoint("client.plan.armed")
            return beats

        return self._client.guard("clock plan", arm, lambda: _beats.inert(self._client))

    def plans(self) -> tuple[PlanView, ...]:
        """The clock plans that are armed for this lease, as the daemon knows them now."""
        return self._client.plans(self.id, self._token) if self.id else ()

    def renew(self) -> bool:
        """Renew the TTL now (the heartbeat does so by itself); False when the lease is gone."""

        def renew() -> bool:
            view = self._client.lease_renew(self.id, self._token)
            self._seen(view)
            return bool(view.id) and self._held

        return self._client.guard("heartbeat", renew, lambda: False) if self._held else False

    def release(self, wait_s: float = 10.0) -> None:
        """Give it back and return when the settings are undone; a second call, or one after a loss, changes nothing.

        A daemon that does not answer within ``wait_s`` and the client's patience is left: the closed connection tells it.
        """
        with self._lock:
            first, self._released = not self._released, True
        if not first or not self.id or os.getpid() != self._owner_pid:
            return
        was_held, self._held = self._held, False
        self._stop.set()
        self._wake_heart()
        self._desk.end("released")

        def give_back() -> None:
            if was_held:
                try:
                    view = self._client.lease_release(self.id, self._token, wait_s)
                    self._view = view if view.id else self._view
                except LeaseLostError:
                    pass  # gone already: that is what was asked for

        try:
            self._client.guard("release", give_back, lambda: None)
        finally:
            self._hang_up()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        try:
            self.release()
        except Exception as own:
            if kind is None:
                raise
            self._client.warn("release", own)  # the caller's exception is the one that matters
        return False

    # -- keeping it alive ------------------------------------------------------------------------------------------------

    def _seen(self, view: LeaseView) -> None:
        if not view.id:
            return
        self._view = view
        if view.state is LeaseState.ENDED:
            self._lose(str(view.end or "ended"))

    def _lose(self, why: str) -> None:
        if self._held:
            self._held, self.lost_reason = False, why
            self._stop.set()
            self._wake_heart()
            self._client.warn(f"lease {self.id}", LeaseLostError(f"lost: {why}"))
            self._desk.end(why)

    def _attach(self) -> socket.socket:
        transport = self._client.transport
        path = Path(transport.socket_path or "").with_name("attach.sock")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(transport.timeout_s)
            sock.connect(str(path))
            check_server(sock, transport.server_uids)
            hello = {"api": ".".join(map(str, API_VERSION)), "lease": self.id, "token": self._token}
            sock.sendall(json.dumps(hello).encode())
            self._take(sock)
            sock.settimeout(None)
        except PowerdError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise UnavailableError(f"cannot attach the lease at {path}: {error or 'timed out'}") from error
        return sock

    def _take(self, sock: socket.socket) -> None:
        """One message of the attach socket: the lease as it is now or why it is not, or something of its clock plans."""
        message, descriptors, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
        try:
            if not message:
                raise UnavailableError("powerd closed the attach socket")
            content = json.loads(message)
            if not isinstance(content, dict):
                raise CodecError("not an object")
            if "error" in content or "code" in content:
                raise error_of(500, message)
            if not self._desk.take(content, descriptors):
                self._seen(decode(LeaseView, content))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnavailableError(f"the attach socket said something that is not powerd's: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _watch(self) -> None:
        """Follow the attach socket; when it closes, come back by token until that is refused or too late."""
        while self._held and not self._stop.is_set():
            sock = self._socket
            if sock is None:
                return
            try:
                self._take(sock)
            except (PowerdError, OSError) as error:
                if self._stop.is_set() or not self._held:
                    return
                if isinstance(error, LeaseLostError):
                    return self._lose(error.message)
                sock.close()
                self._return_by_token()

    def _return_by_token(self) -> None:
        deadline_s, pause_s = time.monotonic() + REATTACH_S, 0.02
        while self._held and not self._stop.is_set():
            try:
                self._socket = self._attach()
                return
            except UnavailableError:
                if time.monotonic() > deadline_s:
                    return self._lose("the daemon went away and did not come back")
            except Exception as error:
                return self._lose(str(error))
            self._stop.wait(pause_s)
            pause_s = min(0.5, pause_s * 2)

    def _beat(self) -> None:
        """Renew the TTL at a third of it, in the node's own time."""
        leave = nothing
        try:
            wait, self._wake_heart, leave = pacer(self._stop, self._client.time_scale)
            while self._held and not self._stop.is_set():
                wait(max(0.1, (self._view.ttl_s or 60.0) / 3))
                if self._stop.is_set() or not self._held:
                    return
                try:
                    view = self._client.transport.json(
                        LeaseView, "POST", f"/v1/leases/{self.id}/heartbeat", headers={"Powerd-Lease-Token": self._token or ""}
                    )
                    self._seen(view)
                except LeaseLostError as error:
                    self._lose(error.message)
                except RequestError as error:
                    if error.code.name == "not_found":
                        self._lose(error.message)
                except PowerdError:
                    continue  # the attach socket decides whether the daemon is gone for good
        except Exception as error:
            self._client.warn("heartbeat", error)
        finally:
            leave()  # a thread that has ended must not hold a stepped node's time

    def _hang_up(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None

    def _forget_in_child(self) -> None:
        """A forked child is not the holder: its copy of the connection must not keep the lease alive."""
        self._held, self.lost_reason = False, "held by the parent process"
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_attached: weakref.WeakSet[Lease] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lease in list(_attached):
        lease._forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
