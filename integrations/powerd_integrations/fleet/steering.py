"""The router's core, whatever carries it: classify a request, count it, choose who serves it, and see it through.

House rules: an admitted request is answered or its client is told why not: a replica that dies in mid-answer costs a retry, never
the request; text that was sent already is not sent again; the same rule chooses here and in the simulator (`dynamollm.router`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from powerd_integrations.fleet import sse
from powerd_integrations.fleet.published import Group, PlanSource, PublishedPlan
from powerd_integrations.fleet.reporter import ArrivalCounter
from powerd_integrations.fleet.settings import FleetSettings
from powerd_integrations.fleet.sizes import OutputSizes, prompt_tokens, wanted_tokens
from powerd_integrations.fleet.waiting import CalledBackError, Waiting
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceState
from powerd_policies.dynamollm.router import PromptTooLongError, Router

log = logging.getLogger("powerd.fleet")
POLL_S: Final = 0.05
AT: Final = b"@"  # before a replica's name
AVOID: Final = "x-powerd-avoid"  # header: replicas that a request shall not come to, with spaces between
REFUSALS: Final = 20  # by replicas that a request avoids, until it goes where it comes to

#: Sends a request to a replica of a group; yields ``@`` and who took it where that is known, the HTTP status as text, then the
#: body as it comes.
Send = Callable[[Group, str, dict[str, Any], Mapping[str, str]], AsyncIterator[bytes]]


class BrokenOffError(RuntimeError):
    """A replica did not finish an answer; the message says how."""


class NobodyServesError(RuntimeError):
    """Nobody serves the request's class, or in an emergency the one who should, and it waited long enough."""


class AvoidedError(RuntimeError):
    """A request came to a replica that it shall avoid."""


@dataclass(slots=True)
class Ticket:
    """One request on its way."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]
    request_class: str
    prompt: int
    output_size: int
    arrived_s: float = 0.0  # on the loop's clock
    sent_text: list[str] = field(default_factory=list)
    sent_tokens: int = 0
    attempts: int = 0
    moved: bool = False  # called back and sent elsewhere once, in an emergency
    avoid: frozenset[str] = frozenset()  # then replicas in trouble
    refusals: int = 0  # by replicas that it avoids

    @property
    def streams(self) -> bool:
        """Whether the client wants tokens as they come."""
        return bool(self.body.get("stream"))


class Steering:
    """Takes requests in one event loop; ``send`` reaches the replicas."""

    def __init__(
        self, settings: FleetSettings, model: EngineModel, source: PlanSource, counter: ArrivalCounter, send: Send
    ) -> None:
        self._settings, self._model, self._source, self._counter, self._send = settings, model, source, counter, send
        self.router = Router(model, settings.classes, settings.engine.chunk_tokens)
        self._sizes = OutputSizes(settings.classes)
        self._groups: dict[str, Group] = {}
        self._seen: tuple[object, object] | None = None
        self._decision: tuple[object, ...] | None = None
        self._looking: asyncio.Task[None] | None = None
        self.waiting = Waiting(self.router, counter.called_back)
        counter.waiting = self.waiting.everywhere
        self.retries = 0

    def admit(self, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> Ticket:
        """Classify and count a request; PromptTooLongError when it is beyond every class."""
        classes = self._settings.classes
        prompt = prompt_tokens(body, headers, self._settings.service.tokens_per_character)
        size = classes.size_of_prompt(prompt)
        if size is None:
            raise PromptTooLongError(f"a prompt of {prompt} tokens; the longest is {classes.context_limit}")
        output = self._sizes.predict(size, wanted_tokens(body))
        name = NAMES[3 * size + classes.size_of_output(output)]
        if self._settings.engine.priorities:
            body = {**body, "priority": round(1000 * (time.time() + classes.slos[name].ttft_s))}  # its deadline: lowest first
        ticket = Ticket(path, body, headers, name, prompt, classes.size_of_output(output))
        self._counter.count(ticket.request_class, prompt, output)
        return ticket

    async def answer(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """Yield the HTTP status as text, then the body; a replica that dies is replaced by another one on the way.

        Raises ``NobodyServesError``, and ``BrokenOffError`` when every attempt failed.
        """
        began, ticket.arrived_s = False, asyncio.get_running_loop().time()
        while True:
            instance, group = await self._place(ticket)
            ticket.attempts += 1
            relay = self._relay(ticket, instance, group)
            try:
                async for part in relay:
                    if part.isdigit() and not began:
                        began = True
                        yield part
                    elif not part.isdigit():
                        yield part
                return
            except CalledBackError as error:
                if error.call == "shed":
                    raise NobodyServesError(str(error)) from None
                ticket.moved, ticket.avoid = True, self.waiting.troubled
                ticket.attempts -= 1
            except AvoidedError:
                ticket.attempts -= 1
                ticket.refusals += 1
                if ticket.refusals >= REFUSALS:
                    ticket.avoid = frozenset()
                await asyncio.sleep(POLL_S)
            except BrokenOffError as error:
                if ticket.attempts >= self._settings.service.attempts or not _can_go_on(ticket):
                    raise
                self.retries += 1
                log.warning(
                    "%s of %s: %s; asking another one (attempt %d)", ticket.request_class, group, error, ticket.attempts + 1
                )
            finally:
                await relay.aclose()

    # --- one attempt ----------------------------------------------------------------------------------------------------------

    async def _relay(self, ticket: Ticket, instance: str, group: Group) -> Any:
        """Yield status and body of one attempt; every way out is counted at the router."""
        if not ticket.sent_text:
            ticket.sent_tokens = 0  # none of them was text yet: the client will not see any twice
        body, headers = _rest_of(ticket)
        first, told, whole, before = True, False, False, ticket.sent_tokens
        answer = self._send(group, ticket.path, body, headers)
        # Of an answer that comes whole nobody knows whether it has begun, and one that goes on has.
        waits = ticket.streams and not ticket.sent_text
        leash = self.waiting.hold(instance, ticket.arrived_s, ticket.prompt, ticket.output_size, moved=ticket.moved, waits=waits)
        parts = leash.guard(answer)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        try:
            status = await _first(parts)
            if status.startswith(AT):  # Serve chose among the group's replicas: this one it is
                taken = status.removeprefix(AT).decode()
                if taken in ticket.avoid:
                    raise AvoidedError(taken)
                self.waiting.move(leash, taken)
                status = await _first(parts)
            if ticket.streams and status == b"200":
                async for event in _events(parts):
                    said = sse.read(event)
                    if said.error is not None and not said.error.refused:
                        raise BrokenOffError(said.error.message)
                    if not told:  # an answer that has not begun can still be a refusal
                        self.waiting.let_go(leash)
                        told = True
                        yield status
                    if said.counts:
                        ticket.sent_tokens = ticket.sent_tokens + 1 if said.tokens is None else before + said.tokens
                        if first:
                            first = False
                            self.router.first_token(instance, ticket.prompt)
                    if said.text:
                        ticket.sent_text.append(said.text)
                    yield event
                    if said.done:
                        whole = True
                        break
                if not whole:
                    raise BrokenOffError("the stream ended in the middle")
            else:
                rest = [part async for part in parts]
                whole = True
                yield status
                yield b"".join(rest)
            self._sizes.learn(ticket.prompt, ticket.sent_tokens)
        except (asyncio.CancelledError, GeneratorExit, BrokenOffError, CalledBackError, AvoidedError):
            raise
        except Exception as error:  # whatever carries requests has errors of its own: Ray's, a socket's
            raise BrokenOffError(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}") from None
        finally:
            self.waiting.let_go(leash)
            if first:
                self.router.abandoned(instance, ticket.prompt)
            else:
                self.router.finished(instance)
            await parts.aclose()
            close = getattr(answer, "aclose", None)
            if close is not None:
                await close()

    async def _place(self, ticket: Ticket) -> tuple[str, Group]:
        """Choose a replica; waits while nobody serves the class."""
        end_s = time.monotonic() + self._settings.service.queue_timeout_s
        while True:
            self._refresh()
            instance = self.router.route(ticket.prompt, ticket.output_size, ticket.avoid)
            if instance is not None:
                return instance, self._groups[instance]
            if time.monotonic() >= end_s:
                waited = f"{self._settings.service.queue_timeout_s:g} s"
                raise NobodyServesError(f"nobody serves requests of class {ticket.request_class} after {waited}")
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        """See what the plan says while requests wait, also when no other comes."""
        while not self.waiting.empty:
            self._refresh()
            await asyncio.sleep(POLL_S)

    def _refresh(self) -> None:
        plan = self._source.plan()
        if plan is None:
            return
        self._obey(plan)
        if (seen := (plan.routes, plan.serving)) == self._seen:
            return
        self._seen = seen
        self._groups = {replica.id: replica.group for replica in plan.serving}
        self.router.update(*self._as_instances(plan))

    def _obey(self, plan: PublishedPlan) -> None:
        """Do what each decision wants of waiting requests, once; a planner that is away wants nothing any more."""
        fresh = plan.age_s() <= self._settings.service.stale_after_s
        decision = (plan.decided_unix_s, plan.resteered, plan.shed_after_s) if fresh else ()
        if decision != self._decision:
            self._decision = decision
            self.waiting.obey(plan.resteered if fresh else (), plan.shed_after_s if fresh else {})

    def _as_instances(self, plan: PublishedPlan) -> tuple[FleetPlan, list[InstanceState]]:
        """The router's own words: a group is a pool to it, and a clock is one that the model has figures for."""
        states = []
        for replica in plan.serving:
            clocks = self._model.clocks_mhz(replica.group.tp)
            if not clocks:
                log.error("%s has no figures for TP%d: %s gets no requests", self._model.name, replica.group.tp, replica.id)
                continue
            clock_mhz = next((c for c in clocks if c <= replica.clock_mhz), clocks[-1]) if replica.clock_mhz else clocks[0]
            states.append(InstanceState(replica.id, str(replica.group), replica.group.tp, clock_mhz))
        return FleetPlan((), {name: tuple(str(group) for group in groups) for name, groups in plan.routes.items()}), states


def _can_go_on(ticket: Ticket) -> bool:
    """Whether another replica can take over: nothing was sent yet, or the prompt is text that the sent text can follow."""
    return not ticket.sent_text or isinstance(ticket.body.get("prompt"), str)


def _rest_of(ticket: Ticket) -> tuple[dict[str, Any], Mapping[str, str]]:
    """What is left to ask for: the prompt with what was answered already, and as many tokens fewer."""
    done = ticket.sent_tokens
    if not done:
        avoid = {AVOID: " ".join(sorted(ticket.avoid))} if ticket.avoid else {}
        return ticket.body, {**ticket.headers, **avoid}
    body = {**ticket.body, "prompt": ticket.body["prompt"] + "".join(ticket.sent_text)}
    if "max_tokens" in body:
        body["max_tokens"] = max(1, int(body["max_tokens"]) - done)
    headers = {name: value for name, value in ticket.headers.items() if name != "x-prompt-tokens"}
    if declared := ticket.headers.get("x-prompt-tokens", ""):
        headers["x-prompt-tokens"] = str(int(declared) + done)
    return body, headers


async def _first(answer: AsyncIterator[bytes]) -> bytes:
    async for part in answer:
        return part
    raise BrokenOffError("no answer")


async def _events(answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole server-sent events, however they were cut."""
    held = b""
    async for part in answer:
        held += part
        while (end := held.find(b"\n\n")) >= 0:
            yield held[: end + 2]
            held = held[end + 2 :]
