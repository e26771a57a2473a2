"""Requests that wait for their first token, and what an emergency does with them: the ladder's live half (DynamoLLM section 4.4).

House rules: only a request whose client has seen nothing is called back, and of an answer that comes whole nobody can know, so it
stays; a request is sent elsewhere at most once, and only where somebody out of trouble serves its class; what is called back is
counted when it is; measures that nobody renews end.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from powerd_integrations.fleet.observed import Waited
from powerd_policies.dynamollm.router import Router

T = TypeVar("T")
Call = Literal["resteer", "shed"]
_END: Final = object()


class CalledBackError(Exception):
    """A waiting request was called back: sent elsewhere, or rejected, as ``call`` says."""

    def __init__(self, call: Call, instance: str, waited_s: float) -> None:
        super().__init__(f"overload: it waited {waited_s:.3g} s at {instance} for its first token; try again later")
        self.call = call


@dataclass(slots=True, eq=False)
class Leash:
    """One request at one instance, on a loop's clock; ``moved``: it was sent elsewhere before."""

    instance: str
    since_s: float  # the router got it
    prompt_tokens: int
    output_size: int
    moved: bool
    owner: Waiting
    called: asyncio.Future[Call]
    held: bool = True  # until its first token
    timer: asyncio.TimerHandle | None = None

    async def first(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something, unless the request is called back before that comes: CalledBackError."""
        if not self.held:
            return await work
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self.called), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.owner.call_back(self)
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def guard(self, parts: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Yield what comes, as ``first`` does until the request is let go."""
        while self.held:
            if self.called.done():
                raise self.owner.call_back(self)
            part = await self.first(_next(parts))
            if part is _END:
                return
            yield part
        async for part in parts:
            yield part


@dataclass(slots=True)
class Waiting:
    """All waiting requests of a router; ``done(instance, call)`` is told of each that is called back."""

    router: Router
    done: Callable[[str, Call], object]
    troubled: frozenset[str] = frozenset()  # instances that get nothing that was called back
    _shed: Mapping[str, float] = field(default_factory=dict)
    _until_s: float = math.inf
    _at: dict[str, set[Leash]] = field(default_factory=lambda: defaultdict(set))
    _loop: asyncio.AbstractEventLoop | None = None

    def hold(
        self, instance: str, since_s: float, prompt_tokens: int, output_size: int, *, moved: bool = False, waits: bool = True
    ) -> Leash:
        """From now on a request waits there; ``waits`` False: it cannot be known, it is let go at once."""
        self._loop = asyncio.get_running_loop()
        leash = Leash(instance, since_s, prompt_tokens, output_size, moved, self, self._loop.create_future(), waits)
        if waits:
            self._at[instance].add(leash)
            self._watch(leash)
        return leash

    def move(self, leash: Leash, instance: str) -> None:
        """It waits at another instance than was thought."""
        if leash.held and leash.instance != instance:
            self.let_go(leash)
            leash.held, leash.instance = True, instance
            self._at[instance].add(leash)
            self._watch(leash)

    def let_go(self, leash: Leash) -> None:
        """It got its first token, or left; harmless when it had."""
        leash.held = False
        if leash.timer is not None:
            leash.timer.cancel()
        if (here := self._at.get(leash.instance)) is not None:
            here.discard(leash)
            if not here:
                del self._at[leash.instance]

    def call_back(self, leash: Leash) -> CalledBackError:
        """Count one that was called and has not begun; what its router is to raise."""
        self.let_go(leash)
        call = leash.called.result()
        self.done(leash.instance, call)
        return CalledBackError(call, leash.instance, asyncio.get_running_loop().time() - leash.since_s)

    def obey(self, resteered: Collection[str], shed: Mapping[str, float], until_s: float = math.inf) -> None:
        """Do what a decision wants of waiting requests: those of ``resteered`` move now; who waits longer than ``shed`` is
        rejected when it does, until the next decision or ``until_s``."""
        self.troubled, self._shed, self._until_s = frozenset(resteered) | frozenset(shed), dict(shed), until_s
        for leash in [leash for here in self._at.values() for leash in here]:
            self._watch(leash)
            # Who would not find a better place keeps its turn in the engine's queue.
            if leash.instance in resteered and not leash.moved and self._elsewhere(leash) and not leash.called.done():
                leash.called.set_result("resteer")

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._at

    def at(self, instance: str) -> Waited:
        """What waits at an instance; may be called from another thread."""
        here, now_s = list(self._at.get(instance, ())), 0.0 if self._loop is None else self._loop.time()
        oldest_s = max((now_s - leash.since_s for leash in here), default=0.0)
        return Waited(len(here), sum(leash.prompt_tokens for leash in here), max(0.0, oldest_s))

    def everywhere(self) -> dict[str, Waited]:
        """What waits, by instance; may be called from another thread."""
        return {instance: self.at(instance) for instance in list(self._at)}

    def _elsewhere(self, leash: Leash) -> bool:
        return self.router.has_other(leash.prompt_tokens, leash.output_size, self.troubled)

    def _watch(self, leash: Leash) -> None:
        if leash.timer is not None:
            leash.timer.cancel()
        patience_s = self._shed.get(leash.instance)
        if patience_s is not None:
            loop = asyncio.get_running_loop()
            leash.timer = loop.call_at(leash.since_s + patience_s, self._late, leash)

    def _late(self, leash: Leash) -> None:
        if leash.held and not leash.called.done() and asyncio.get_running_loop().time() <= self._until_s:
            leash.called.set_result("shed")


async def _next(parts: AsyncIterator[Any]) -> Any:
    return await anext(parts, _END)


def says(resteered: int, rejected: int) -> str:
    """What was done at an instance, for an event."""
    return f"{resteered} waiting requests were sent elsewhere, {rejected} were rejected"
