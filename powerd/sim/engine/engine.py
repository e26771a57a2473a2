"""The engine: iterations one after the other on an event loop, each as long as the model says at the clock that the GPU has.

House rules: iterations follow each other without a gap on a timeline of their own, so that a loop that wakes late delays what
a client sees but neither speed nor metrics; the clock is read and power declared at the begin of an iteration; a request ends
exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType

from powerd.sim.engine.batch import Batch, Iteration, Request
from powerd.sim.engine.hardware import Hardware
from powerd.sim.engine.metrics import Metrics
from powerd.sim.engine.speed import Speed
from powerd.sim.node import SimError
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import InstanceLoad

RATES_S = 10.0  # over which `Engine.load` states rates


class DrainingError(RuntimeError):
    """The engine takes no new request."""


class EngineDiedError(RuntimeError):
    """The engine ended while the request was in it."""


class PriorityError(ValueError):
    """A priority for an engine that serves who came first."""


class TooLongError(ValueError):
    """Prompt and answer do not fit; the message says what would."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine is set up."""

    model: EngineModel
    tp: int
    name: str = ""  # the served model's; default: the model's own
    chunk_tokens: int = 512  # prompt tokens of one iteration at most
    max_running: int = 256
    max_context: int = 16384
    keep_gaps: bool = False  # of every request, for `Stream.tbt_p99_s`
    by_priority: bool = False  # who waits is served by priority, lowest first


class Stream:
    """The tokens of one request: iterate for how many came since the last look; ends when the answer is complete."""

    def __init__(self, engine: Engine, request: Request, reason: str) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.gaps_s: list[float] = []  # between tokens, where they are kept
        self._end_reason = reason
        self._engine = engine
        self._seen = 0
        self._error: Exception | None = None
        self._wake: asyncio.Future[None] | None = None

    def _tell(self, error: Exception | None = None) -> None:
        self._error = error or self._error
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def __aiter__(self) -> AsyncIterator[int]:
        while True:
            if (new := self.request.generated - self._seen) > 0:
                self._seen += new
                yield new
            elif self._error is not None:
                raise self._error
            elif self.finish_reason is not None:
                return
            else:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake

    async def whole(self) -> Request:
        """Wait for the complete answer; EngineDiedError when there will be none."""
        async for _ in self:
            pass
        return self.request

    @property
    def tbt_p99_s(self) -> float | None:
        """The gap between tokens that 99 of 100 of its gaps keep; None when there was none or none was kept."""
        return sorted(self.gaps_s)[math.ceil(0.99 * len(self.gaps_s)) - 1] if self.gaps_s else None

    def cancel(self) -> None:
        """Nobody waits for the rest; harmless when it has ended."""
        self._engine.cancel(self)


class Engine:
    """One simulated instance; use as an async context manager on a loop of the node's clock."""

    def __init__(self, options: Options, hardware: Hardware) -> None:
        self.options, self.hardware = options, hardware
        self.name = options.name or options.model.name
        self.speed = Speed(options.model, options.tp)
        self.batch = Batch(options.model.kv_tokens[options.tp], options.chunk_tokens, options.max_running, options.by_priority)
        self.max_context = min(options.max_context, self.batch.kv_tokens)
        self.metrics = Metrics(self.name, self.max_context, self.batch.kv_tokens)
        self.on_token: Callable[[int], None] = lambda total: None  # how many tokens it has made; for injected faults
        self.tokens = 0
        self.arrived = self.arrived_tokens = 0
        self.energy_j = 0.0  # declared, of all GPUs, of iterations that ended
        self.busy_s = 0.0
        self.draining = False
        self.dead: Exception | None = None
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._looks: deque[tuple[float, int, int, int]] = deque()

    async def __aenter__(self) -> Engine:
        self._task = asyncio.get_running_loop().create_task(self._work(), name=f"engine {self.name}")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    # -- requests --------------------------------------------------------------------------------------------------------

    def submit(self, prompt_tokens: int, max_tokens: int, stop_after: int | None = None, priority: int = 0) -> Stream:
        """Queue a request; its answer has ``max_tokens`` tokens, or fewer where the simulated model stops by itself.

        DrainingError, EngineDiedError, TooLongError when it would not fit, PriorityError when it cannot go by its priority.
        """
        if self.dead is not None:
            raise EngineDiedError(str(self.dead)) from self.dead
        if self.draining:
            raise DrainingError("the engine is draining")
        if priority and not self.options.by_priority:
            raise PriorityError(f"priority {priority}: this engine was not started with --scheduling-policy priority")
        if prompt_tokens < 1 or max_tokens < 1:
            raise TooLongError("a prompt and an answer have at least 1 token")
        if prompt_tokens + max_tokens > self.max_context:
            raise TooLongError(f"{prompt_tokens} + {max_tokens} tokens are longer than the context of {self.max_context} tokens")
        stops = stop_after is not None and stop_after < max_tokens
        output = max(1, min(max_tokens, stop_after or max_tokens))
        now_s = asyncio.get_running_loop().time()
        request = Request(next(self._numbers), prompt_tokens, output, now_s, max_tokens, priority)
        stream = self._streams[request.id] = Stream(self, request, "stop" if stops else "length")
        self.batch.add(request)
        self.arrived, self.arrived_tokens = self.arrived + 1, self.arrived_tokens + prompt_tokens
        self._idle.clear()
        self._arrived.set()
        return stream

    def cancel(self, stream: Stream) -> None:
        """Abort a request; harmless when it has ended."""
        if self._streams.pop(stream.request.id, None) is not None:
            self.batch.remove(stream.request)
            stream.finish_reason = "abort"
            stream._tell()
            self._settle()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def load(self) -> InstanceLoad:
        """What it has to do now; rates are over the looks of the last ``RATES_S`` seconds, None at the first one."""
        batch = self.batch
        now_s = asyncio.get_running_loop().time()
        decoding = sum(request.generated > 0 for request in batch.running)
        looks = self._looks
        while len(looks) > 1 and looks[1][0] <= now_s - RATES_S:
            looks.popleft()
        before = looks[0] if looks and looks[0][0] < now_s else None
        here = (now_s, self.arrived, self.arrived_tokens, self.tokens)
        looks.append(here)
        rates = (
            (None,) * 3 if before is None else tuple((b - a) / (now_s - before[0]) for a, b in zip(before, here, strict=True))[1:]
        )
        return InstanceLoad(
            requests_per_s=rates[0], prompt_tokens_per_s=rates[1], output_tokens_per_s=rates[2],
            running=decoding, queued=self.in_flight - decoding, queued_prompt_tokens=batch.queued_prompt_tokens,
            kv_used_ratio=batch.kv_used / batch.kv_tokens,
            oldest_wait_s=max((now_s - r.arrived_s for r in (*batch.running, *batch.waiting) if r.first_s is None), default=0.0),
        )  # fmt: skip

    # -- ending ----------------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float | None = None) -> int:
        """Take nothing new and let everything in flight finish; returns how many were aborted at the timeout."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        left = list(self._streams.values())
        for stream in left:
            stream._tell(EngineDiedError("the engine was stopped"))
            self.cancel(stream)
        return len(left)

    async def close(self) -> None:
        """Stop at once; requests in flight raise EngineDiedError; the GPUs are given back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._die(EngineDiedError("the engine was closed"))
            self.hardware.close()

    def _die(self, why: Exception) -> None:
        self.dead = self.dead or why
        for stream in list(self._streams.values()):
            stream._tell(EngineDiedError(str(why)))
            self.cancel(stream)

    def _settle(self) -> None:
        if not self._streams:
            self._idle.set()

    # -- work ------------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        try:
            while True:
                iteration = self.batch.next(begin_s)
                if iteration is None:
                    begin_s = await self._wait(begin_s)
                    continue
                now = self.speed.at(self.hardware.clock_mhz())
                prompt_tokens, decoding = iteration.prompt_tokens, len(iteration.decodes)
                seconds, joules = now.iteration_s(prompt_tokens, decoding), now.iteration_j(prompt_tokens, decoding)
                self.hardware.declare(joules / seconds)
                end_s = begin_s + seconds
                await _until(loop, end_s)
                self.busy_s += seconds
                self.energy_j += joules * self.options.tp
                self._serve(iteration, end_s)
                begin_s = end_s
        except SimError as error:
            self._die(error)

    async def _wait(self, begin_s: float) -> float:
        """Rest until there is something to do; the moment it arrived."""
        if not self.batch.waiting:
            self.hardware.rest()
            self._arrived.clear()
            await self._arrived.wait()
        # On a loop that woke late the request may be older than this moment, but not older than the last iteration's end.
        first_s = min((request.arrived_s for request in self.batch.waiting), default=begin_s)
        return max(begin_s, first_s)

    def _serve(self, iteration: Iteration, end_s: float) -> None:
        last_s = {id(r): r.last_s for r in (*iteration.decodes, *(r for r, _ in iteration.chunks))}
        gaps_s, first = [], []
        for request in self.batch.finish(iteration, end_s):
            stream = self._streams.get(request.id)
            if stream is None:  # cancelled while it was computed
                self.batch.remove(request)
                continue
            self.tokens += 1
            before_s = last_s.get(id(request))
            if request.generated == 1:
                first.append(request)
            elif before_s is not None:
                gaps_s.append(end_s - before_s)
                if self.options.keep_gaps:
                    stream.gaps_s.append(end_s - before_s)
            if request.generated >= request.output_tokens:
                stream.finish_reason = stream._end_reason
                del self._streams[request.id]
                self.metrics.ended(request, stream.finish_reason)
            stream._tell()
        self.metrics.iteration(gaps_s, first)
        self.on_token(self.tokens)
        self._settle()


async def _until(loop: asyncio.AbstractEventLoop, when_s: float) -> None:
    """Sleep until then; a moment that has passed already only lets others have their turn."""
    if loop.time() >= when_s:
        await asyncio.sleep(0)
        return
    done = loop.create_future()
    handle = loop.call_at(when_s, _finish, done)
    try:
        await done
    finally:
        handle.cancel()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
