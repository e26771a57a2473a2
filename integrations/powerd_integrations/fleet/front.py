"""The door of a local fleet: OpenAI's paths in front, engines behind, and no request lost while engines come and go.

House rules: a request whose engine failed before its first token goes to another one; after that its client sees an error and
it is counted; a replica that does not answer gets nothing until it is healthy again; whom a request goes to is the Router's
decision.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from powerd_integrations.fleet import bodies, sse
from powerd_integrations.fleet.tally import Passed, Tally
from powerd_integrations.fleet.waiting import CalledBackError, Leash, Waiting, says
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceLoad, InstanceState
from powerd_policies.dynamollm.router import PromptTooLongError, Router

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

PATHS: Final = ("/v1/completions", "/v1/chat/completions")
_NOT_PASSED: Final = frozenset({"host", "content-length", "connection", "transfer-encoding", "keep-alive", "accept-encoding"})
_PASSED_BACK: Final = ("Content-Type", "Retry-After", "X-Request-Id")


@dataclass(frozen=True, slots=True)
class FrontOptions:
    """How a front behaves; seconds of its loop's clock."""

    queue_timeout_s: float = 60.0  # a request for which nobody serves waits so long
    attempts: int = 4
    connect_timeout_s: float = 5.0
    silence_s: float | None = 120.0  # a stream that says nothing for longer is taken for dead
    answer_s: float | None = 1800.0  # likewise an answer that is not a stream
    probe_s: float = 0.5  # from a failure to the first look at /health, doubled with each failure in a row
    tokens_per_character: float = 0.25  # of a prompt that is text
    default_output_tokens: int = 256
    priorities: bool = False  # tell engines each request's deadline: they were started to go by priority
    rescue_s: float = 30.0  # what a plan wants of waiting requests is done so long without a newer plan


class _BrokenError(Exception):
    """An engine failed a request that can go to another one; ``took``: it may have begun to compute it."""

    def __init__(self, message: str, took: bool = True) -> None:
        super().__init__(message)
        self.took = took


class Front:
    """Passes requests on to the replicas of ``update``; use as an async context manager, or only ``handler`` in an own server.

    ``predict(prompt_tokens, max_tokens)`` says how many tokens an answer will have; default: as many as were asked for.
    """

    def __init__(
        self,
        model: EngineModel,
        options: FrontOptions | None = None,
        *,
        router: Router | None = None,
        predict: Callable[[int, int], int] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.options = options or FrontOptions()
        self.router = router or Router(model)
        self.tally = Tally()
        self.each: Callable[[Passed], None] = lambda passed: None  # called with every request that has ended
        self._model, self._predict = model, predict or (lambda prompt_tokens, max_tokens: max_tokens)
        self._host, self._port = host, port
        self._urls: dict[str, str] = {}
        self._plan = FleetPlan((), {})
        self._states: tuple[InstanceState, ...] = ()
        self._suspects: dict[str, asyncio.Task[None]] = {}
        self._strikes: Counter[str] = Counter()
        self._waiting = Waiting(self.router, self.tally.called)
        self._changed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Front:
        import aiohttp
        from aiohttp import web

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.options.connect_timeout_s)
        # vLLM closes a connection that was idle for 5 s; a request that is sent at that moment would be taken for a failure.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        app = web.Application(client_max_size=64 << 20)
        app.add_routes([web.post(path, self.handle) for path in PATHS])
        app.add_routes([
            web.get("/health", self._health), web.get("/metrics", self._metrics), web.get("/v1/models", self._models)
        ])  # fmt: skip
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._suspects.values():
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._host}:{self._port}"

    @property
    def tps(self) -> tuple[int, ...]:
        """The tensor parallelisms that it has figures for."""
        return self._model.tps

    # -- the fleet -------------------------------------------------------------------------------------------------------

    def update(self, plan: FleetPlan, states: Iterable[InstanceState], urls: Mapping[str, str]) -> None:
        """Take the newest fleet: routes, replicas as they are, and where they answer; LookupError when a TP has no figures."""
        self._plan, self._urls = plan, dict(urls)
        self._states = tuple(replace(state, clock_mhz=self._nearest(state)) for state in states)
        for gone in set(self._suspects) - set(self._urls):
            self._suspects.pop(gone).cancel()
        self._tell()

    def _nearest(self, state: InstanceState) -> int:
        clocks = self._model.clocks_mhz(state.tp)
        if not clocks:
            raise LookupError(f"{self._model.name} has no figures for TP{state.tp}, only for TP {self._model.tps}")
        return min(clocks, key=lambda clock: abs(clock - state.clock_mhz))

    def _tell(self) -> None:
        self.router.update(self._plan, [state for state in self._states if state.id not in self._suspects])
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def in_flight(self, replica: str) -> int:
        """Requests at one replica now."""
        return self.tally.at[replica]

    def load(self, replica: str) -> InstanceLoad:
        """What one replica has to do as the front knows it, which an engine's metrics do not tell: who waits since when."""
        waits = self._waiting.at(replica)
        return InstanceLoad(self.tally.at[replica] - waits.requests, waits.requests, waits.prompt_tokens, None, waits.oldest_s)

    async def empty(self, replica: str) -> None:
        """Return when nothing is in flight at a replica; take it out of the router first."""
        while self.tally.at[replica]:
            await self._changed.wait()

    def suspect(self, replica: str) -> None:
        """Give a replica nothing until it is healthy again."""
        if replica not in self._suspects and replica in self._urls:
            self._strikes[replica] += 1
            self._suspects[replica] = asyncio.get_running_loop().create_task(self._probe(replica))
            self._tell()

    async def _probe(self, replica: str) -> None:
        # One that drains, or hangs, is healthy all along.
        await asyncio.sleep(self.options.probe_s * 2 ** min(7, self._strikes[replica] - 1))
        while not await self.healthy(self._urls[replica]):
            await asyncio.sleep(self.options.probe_s)
        self._suspects.pop(replica, None)
        self._tell()

    async def healthy(self, url: str) -> bool:
        """Whether an engine answers 200 on /health."""
        import aiohttp

        assert self._session is not None, "the front has not begun"
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(self.options.connect_timeout_s), self._session.get(f"{url}/health") as answer:
                return answer.status == 200
        return False

    # -- requests --------------------------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        from aiohttp import web

        loop = asyncio.get_running_loop()
        raw, options = await request.read(), self.options
        try:
            body = bodies.read(raw, request.headers, options.tokens_per_character, options.default_output_tokens)
        except ValueError as error:
            passed = Passed(None, 0, 0, loop.time())
            self.tally.arrived(passed)
            return self._refuse(passed, 400, str(error))
        prompt_tokens, classes = body.prompt_tokens, self.router.classes
        predicted = max(1, self._predict(prompt_tokens, body.max_tokens))
        passed = Passed(classes.name(prompt_tokens, predicted), prompt_tokens, predicted, loop.time())
        self.tally.arrived(passed)
        if passed.request_class is None:
            return self._refuse(passed, 400, f"a prompt of {prompt_tokens} tokens; the longest is {classes.context_limit}")
        if options.priorities:
            raw = bodies.with_priority(raw, passed.received_s + classes.slos[passed.request_class].ttft_s)
        try:
            async with asyncio.timeout(self.options.queue_timeout_s) as patience:
                while True:
                    replica = await self._choose(passed)
                    deadline_s = patience.when()
                    patience.reschedule(None)
                    passed.replica = replica
                    try:
                        return await self._pass(request, raw, body, passed, replica)
                    except CalledBackError as error:
                        if error.call == "shed":
                            return self._refuse(passed, 503, str(error))
                        passed.moved = True
                        self.tally.retried += 1
                    except _BrokenError as error:
                        self.suspect(replica)
                        self.tally.retried += 1
                        if error.took:  # refusals cost nothing: they are only bounded by the time that a request may wait
                            passed.attempts, deadline_s = passed.attempts + 1, loop.time() + self.options.queue_timeout_s
                        if passed.attempts >= self.options.attempts:
                            return self._fail(passed, f"{passed.attempts} replicas failed, at last: {error}")
                    patience.reschedule(deadline_s)
        except TimeoutError:
            return self._refuse(
                passed, 503, f"nobody served class {passed.request_class} within {self.options.queue_timeout_s:g} s"
            )
        except (asyncio.CancelledError, ConnectionResetError):
            self._end(passed, "cancelled")
            raise
        except web.HTTPException:
            self._end(passed, "rejected")
            raise
        except PromptTooLongError as error:
            return self._refuse(passed, 400, str(error))

    async def _choose(self, passed: Passed) -> str:
        while True:
            changed = self._changed
            avoid = self._waiting.troubled if passed.moved else ()
            if (replica := self.router.route(passed.prompt_tokens, passed.output_size, avoid)) is not None:
                return replica
            await changed.wait()

    def rescue(self, plan: FleetPlan) -> list[tuple[str, str]]:
        """Do what a plan wants of requests without a token; replicas, and what was done there since the last call."""
        self._waiting.obey(plan.resteered, plan.shed, asyncio.get_running_loop().time() + self.options.rescue_s)
        return [(replica, says(*counts)) for replica, counts in self.tally.take_rescued().items()]

    async def _pass(
        self, request: web.Request, raw: bytes, body: bodies.Read, passed: Passed, replica: str
    ) -> web.StreamResponse:
        """Pass a request on to one replica; _BrokenError as long as the client has not been told anything."""
        import aiohttp

        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_PASSED}
        self.tally.at[replica] += 1
        response: web.StreamResponse | None = None
        watch = sse.Watch()
        # Of an answer that comes whole nobody knows whether it has begun: it stays where it is.
        leash = self._waiting.hold(
            replica, passed.received_s, passed.prompt_tokens, passed.output_size, moved=passed.moved, waits=body.stream
        )
        try:
            async with await leash.first(self._post(self._urls[replica] + request.path, raw, headers, body.stream)) as answer:
                if answer.status >= 500:
                    raise _BrokenError(f"{replica} answered {answer.status}", took=answer.status != 503)
                async for piece in leash.guard(sse.pieces(answer, watch, self.options.silence_s)):
                    if response is None:
                        self._first(passed, replica, leash)
                        response = await _begin(request, answer)
                    passed.chunks += 1
                    await response.write(piece)
            if response is None:
                raise _BrokenError(f"{replica} answered nothing")
            self._strikes.pop(replica, None)
            if watch.error is not None and not watch.error.refused:
                self.suspect(replica)
                self._end(passed, "failed")
            self._end(passed, "answered" if answer.status < 400 and watch.error is None else "rejected")
            await response.write_eof()
            return response
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError) as error:
            if request.transport is None or request.transport.is_closing():
                raise asyncio.CancelledError from error
            if response is None:
                raise _BrokenError(f"{replica}: {str(error) or type(error).__name__}") from error
            return await self._broke_off(passed, response, replica, error)
        finally:
            self._left(passed, replica, leash)

    async def _post(self, url: str, raw: bytes, headers: Mapping[str, str], stream: bool) -> aiohttp.ClientResponse:
        """Send it and wait for the answer's head: of a stream that comes at once, else with the whole answer."""
        assert self._session is not None, "the front has not begun"
        async with asyncio.timeout(self.options.silence_s if stream else self.options.answer_s):
            return await self._session.post(url, data=raw, headers=headers)

    async def _broke_off(
        self, passed: Passed, response: web.StreamResponse, replica: str, error: Exception
    ) -> web.StreamResponse:
        """The engine is gone in mid-answer: the client is told, in the way of a stream."""
        self.suspect(replica)
        self._end(passed, "failed")
        message = f"the engine failed in mid-answer ({str(error) or type(error).__name__}); tokens so far are valid"
        with contextlib.suppress(OSError):
            await response.write(bodies.broken_stream(message))
            await response.write_eof()
        return response

    # -- accounts --------------------------------------------------------------------------------------------------------

    def _first(self, passed: Passed, replica: str, leash: Leash) -> None:
        passed.first_s = asyncio.get_running_loop().time()
        self._waiting.let_go(leash)
        self.router.first_token(replica, passed.prompt_tokens)

    def _left(self, passed: Passed, replica: str, leash: Leash) -> None:
        self._waiting.let_go(leash)
        (self.router.finished(replica) if passed.first_s is not None else self.router.abandoned(replica, passed.prompt_tokens))
        self.tally.at[replica] -= 1
        if not self.tally.at[replica]:
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def _end(self, passed: Passed, outcome: Any) -> None:
        if passed.outcome is None:
            self.tally.ended(passed, outcome, asyncio.get_running_loop().time())
            self.each(passed)

    def _refuse(self, passed: Passed, status: int, message: str) -> web.Response:
        self._end(passed, "rejected")
        return _error(status, message)

    def _fail(self, passed: Passed, message: str) -> web.Response:
        self._end(passed, "failed")
        return _error(502, message)

    # -- small answers ---------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        from aiohttp import web

        serving = any(state.phase == "serving" and state.id not in self._suspects for state in self._states)
        return web.Response(status=200 if serving else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(text=self.tally.page())

    async def _models(self, request: web.Request) -> web.Response:
        import aiohttp
        from aiohttp import web

        assert self._session is not None, "the front has not begun"
        for replica in [state.id for state in self._states if state.phase == "serving" and state.id not in self._suspects]:
            # The name that the engines know: they refuse every other one.
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, KeyError):
                url = f"{self._urls[replica]}/v1/models"
                async with asyncio.timeout(self.options.connect_timeout_s), self._session.get(url) as answer:
                    if answer.status == 200:
                        return web.Response(body=await answer.read(), content_type="application/json")
        card = {"id": self._model.name, "object": "model", "owned_by": "powerd"}
        return web.json_response({"object": "list", "data": [card]})


async def _begin(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    from aiohttp import web

    headers = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    return response


def _error(status: int, message: str) -> web.Response:
    from aiohttp import web

    return web.json_response(bodies.error(status, message), status=status, headers={"Retry-After": "1"} if status == 503 else {})
